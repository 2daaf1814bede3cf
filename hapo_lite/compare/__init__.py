"""`python -m hapo_lite.compare`: several methods with several seeds at equal tokens. See docs/compare.md."""
