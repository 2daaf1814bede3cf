"""From traces to tables, HTML and figures: pure functions, wired together by app.py.

Axes: T completion tokens. Nothing here imports the training loop.
"""
