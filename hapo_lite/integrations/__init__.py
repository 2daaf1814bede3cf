"""The kit's functions inside the trainers of other projects."""
