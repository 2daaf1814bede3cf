"""`python -m hapo_lite.preflight`: predicts and measures a recipe's memory, and suggests settings that fit."""
