"""A run's files on the disk and its output on the terminal. Nothing here depends on training."""
