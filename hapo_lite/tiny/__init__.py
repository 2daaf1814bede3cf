"""The built-in task and the bundled model that has learned it."""
