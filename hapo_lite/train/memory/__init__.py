"""What an iteration takes of memory, predicted from the model's config.json."""
