"""The inspector: pure functions that turn traces into tables, HTML and figures, and a page in `tabs/` that shows them.

Axes: T completion tokens. Nothing here imports the training loop.
"""
