"""`python -m hapo_lite.replay`: repeats a skipped step to find where its first non-finite number arises."""
