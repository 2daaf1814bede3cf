"""Several methods with several seeds at equal tokens: plan, runs, numbers, report. See docs/compare.md."""
