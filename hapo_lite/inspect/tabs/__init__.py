"""The tabs of app.py as gradio's widgets: they read boxes, call the pure functions beside them and fill the page."""
