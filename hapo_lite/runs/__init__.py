"""What a run leaves on the disk and shows on the terminal. Nothing here knows how training works."""
