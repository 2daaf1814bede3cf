"""The paper's equations as pure tensor functions: no model, tokenizer, logger, file or device call.

Axis legend of the whole project: B sequences (completions), T completion tokens, N = tokens flattened, D hidden,
V vocabulary, P prompts per iteration, G completions per prompt. Entropy is in nats, over the full vocabulary.
"""
