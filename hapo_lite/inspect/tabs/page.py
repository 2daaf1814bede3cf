"""The inspector's page: its tabs, its look, and the server that serves it."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import plotly

from hapo_lite.errors import UserError
from hapo_lite.inspect import assets, figures
from hapo_lite.inspect.tabs.compare import CompareTab
from hapo_lite.inspect.tabs.generate import GenerateTab
from hapo_lite.inspect.tabs.navigation import COMPARE, GENERATE, RULES, RUN, Navigation
from hapo_lite.inspect.tabs.rules import RulesTab
from hapo_lite.inspect.tabs.run import RunTab
from hapo_lite.inspect.tabs.state import AppState, Session
from hapo_lite.inspect.tabs.updates import give_updates

INLINE_HEIGHT = 900
"""Height of the page in a notebook, pixels."""
PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def build(app: AppState) -> gr.Blocks:
    """The page with its tabs. With a run it opens on the tab Run."""
    with gr.Blocks(title="HAPO inspector", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML('<h1 class="hapo-title">HAPO inspector <small>what every token is given</small></h1>')
        session = gr.State(Session())
        with gr.Tabs(selected=RUN if app.first_run else GENERATE) as tabs:
            with gr.Tab("Generate", id=GENERATE):
                generate = GenerateTab(app, session)
            with gr.Tab("Run", id=RUN):
                run = RunTab(app, session)
            with gr.Tab("Rules", id=RULES):
                RulesTab(app)
            with gr.Tab("Compare", id=COMPARE) as opened:
                CompareTab(app, session, generate.example).fill_when_opened(opened)
        Navigation(app, tabs, generate, run).connect(blocks, session)
    give_updates(blocks)
    return blocks


def theme() -> gr.themes.Base:
    """The theme, with system fonts, so that the page asks no other host for anything."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="stone",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )


def head() -> str:
    """The page's head: Plotly from its package, the figures' templates, the page's script and its style.

    The style is here because gradio rewrites its own `css` argument and drops container queries.
    """
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{assets.style()}</style>"
        f'<script src="/gradio_api/file={PLOTLY_JS}" defer></script>'
        f"<script>window.HAPO_TEMPLATES = {json.dumps(figures.templates())};</script>"
        f"<script>{assets.script()}</script>"
    )


def launch(app: AppState, host: str, port: int, block: bool = True) -> tuple[gr.Blocks, str]:
    """Start the server, and return the page with its address. In a notebook the page shows below the cell.

    port: 0 for the first free port from 7860 on. block: return only after Ctrl-C. Raises UserError if the port is in
    use.
    """
    gr.set_static_paths([str(PLOTLY_JS)])
    blocks = build(app)
    try:
        _, address, _ = blocks.queue().launch(
            server_name=host,
            server_port=port or None,
            prevent_thread_lock=True,
            share=False,  # by default, gradio opens a public tunnel on Colab
            height=INLINE_HEIGHT,
            theme=theme(),
            head=head(),
            footer_links=[],
            run_history=False,  # the browser would keep every answer, and be busy for seconds with a long one
            quiet=True,
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used: {error}") from error
    if block:
        print(f"the inspector is at {address} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return blocks, address
