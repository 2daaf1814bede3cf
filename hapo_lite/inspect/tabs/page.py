"""The page: its three tabs, its look, and the server that gives it out."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import plotly

from hapo_lite.errors import UserError
from hapo_lite.inspect import colour, figures
from hapo_lite.inspect.tabs.compare import CompareTab
from hapo_lite.inspect.tabs.desk import Desk, Session
from hapo_lite.inspect.tabs.generate import GenerateTab
from hapo_lite.inspect.tabs.run import RunTab

ASSETS = Path(figures.__file__).parent
INLINE_HEIGHT = 900
"""Of the page in a notebook, pixels."""
PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def build(desk: Desk) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="HAPO inspector", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML('<h1 class="hapo-title">HAPO inspector <small>what every token is given</small></h1>')
        session = gr.State(Session())
        with gr.Tabs():
            with gr.Tab("Generate"):
                GenerateTab(desk, session)
            with gr.Tab("Run"):
                RunTab(desk, blocks, session)
            with gr.Tab("Compare"):
                CompareTab(desk, session)
    return blocks


def theme() -> gr.themes.Base:
    """System fonts: the page asks no other host for anything."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="stone",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )


def head() -> str:
    """Plotly as it was installed, the figures' templates, the page's script and its style.

    The style goes here because gradio rewrites what it is given as css, and drops container queries.
    """
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{(ASSETS / 'page.css').read_text('utf-8')}{colour.palette_css()}</style>"
        f'<script src="/gradio_api/file={PLOTLY_JS}" defer></script>'
        f"<script>window.HAPO_TEMPLATES = {json.dumps(figures.templates())};</script>"
        f"<script>{(ASSETS / 'page.js').read_text('utf-8')}</script>"
    )


def launch(desk: Desk, host: str, port: int, block: bool = True) -> tuple[gr.Blocks, str]:
    """Start the server; returns the page with its address. In a notebook the page shows below the cell.

    port: 0 for the first from 7860 on that is free; block: until Ctrl-C. Raises UserError on a port in use.
    """
    gr.set_static_paths([str(PLOTLY_JS)])
    blocks = build(desk)
    try:
        _, address, _ = blocks.queue().launch(
            server_name=host,
            server_port=port or None,
            prevent_thread_lock=not block,
            share=False,  # on Colab, gradio would open a public tunnel by itself
            height=INLINE_HEIGHT,
            theme=theme(),
            head=head(),
            footer_links=[],
            quiet=not block,
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used: {error}") from error
    return blocks, address
