"""`hapo_lite.evaluate`: named suites, resumable samples, the numbers and the verdict on base against adapter."""
