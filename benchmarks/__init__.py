"""Programs that measure the kit; docs/measurements.md and docs/results.md have their results."""
