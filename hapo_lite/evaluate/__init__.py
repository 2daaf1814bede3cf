"""`python -m hapo_lite.evaluate`: suites, samples that resume, and the verdict on base against adapter."""
