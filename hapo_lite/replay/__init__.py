"""`python -m hapo_lite.replay`: a skipped step once more, to find where its first non-finite number arises."""
