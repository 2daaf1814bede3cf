"""Small random models of every causal family of transformers, each put through the commands: `make architectures`."""
