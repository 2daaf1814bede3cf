"""Tasks: data sets become prompts with gold answers; graders and reward functions turn completions into rewards."""
