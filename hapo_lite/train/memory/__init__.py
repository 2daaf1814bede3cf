"""Prediction of an iteration's memory from the model's config.json."""
