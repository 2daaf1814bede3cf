"""`python -m hapo_lite.preflight`: a recipe's memory, predicted and measured, and settings that fit."""
