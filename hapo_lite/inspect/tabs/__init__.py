"""The inspector's tabs, built from gradio's components. They read boxes, call pure functions and fill the page."""
