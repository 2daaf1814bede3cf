"""The kit's functions inside other people's trainers. Each module imports its trainer only when it is asked to."""
