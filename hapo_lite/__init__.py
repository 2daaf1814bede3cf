"""HAPO for reasoning models on one GPU: LoRA on a 4-bit base, every token treated by its entropy (arXiv 2509.16591)."""

__version__ = "0.1.0"
