"""`python -m hapo_lite.compare` trains several methods with several seeds at equal tokens. See docs/compare.md."""
