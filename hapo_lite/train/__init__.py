"""`python -m hapo_lite.train`: the loop, from sampled completions to a trained adapter."""
