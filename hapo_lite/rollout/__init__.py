"""Rollout engines: prompts in; completions with sampling log-probabilities, entropies and temperatures out."""
