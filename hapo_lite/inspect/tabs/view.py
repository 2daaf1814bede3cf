"""The part of a tab that shows one generation."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hapo_lite.inspect import markup, views
from hapo_lite.inspect.tabs.desk import QUIET, Desk, Session, Shown
from hapo_lite.inspect.tokens import TokenTable

Update = dict[Any, Any]
"""What an event hands to gradio: component -> what it shall hold; the others stay."""


class TokensView:
    """Facts and coloured tokens, with a download of the table. slot: where in the session the generation is kept."""

    def __init__(self, desk: Desk, slot: str) -> None:
        self.desk, self.slot = desk, slot
        self.summary = gr.HTML(elem_id=f"{slot}-summary")
        self.tokens = gr.HTML(elem_id=f"{slot}-tokens")
        # In the page, but out of sight: the button beside the legend clicks it.
        self.csv = gr.DownloadButton(visible="hidden", elem_id=f"{slot}-csv")
        self.outputs = [self.summary, self.tokens, self.csv]

    @property
    def download(self) -> str:
        """The id that the tokens' CSV button is told."""
        return f"{self.slot}-csv"

    def blank(self, summary: str = "") -> Update:
        return {self.summary: summary, self.tokens: ""}

    def streaming(self, table: TokenTable) -> Update:
        return {self.summary: "", self.tokens: markup.token_text(table, streaming=True)}

    def write_csv(self, session: Session) -> gr.DownloadButton:
        """After the page is filled, which need not wait for it."""
        return gr.DownloadButton(value=self.desk.csv_file(session, self.slot))


class GenerationView(TokensView):
    """The tokens, the figures, the what-if and the dual-entropy words."""

    def __init__(self, desk: Desk, slot: str, session: gr.State) -> None:
        super().__init__(desk, slot)
        self.figures = gr.HTML(elem_id=f"{slot}-figures")
        with gr.Accordion("What if the ratio were r?", open=True, visible=False) as self.question:
            with gr.Row():
                self.ratio = gr.Slider(0.4, 1.9, 1.0, step=0.01, label="Ratio r", elem_id=f"{slot}-ratio")
                self.answer = gr.Radio(["right", "wrong"], value="right", label="Answer", elem_id=f"{slot}-answer")
            self.what_if = gr.HTML(elem_id=f"{slot}-what-if")
        with gr.Accordion("The same word at high and low entropy", open=True, visible=False) as self.dual:
            self.words = gr.HTML(elem_id=f"{slot}-words")
        self.outputs += [self.figures, self.question, self.what_if, self.dual, self.words, self.ratio, self.answer]
        asked = [self.ratio.change, self.answer.input]
        gr.on(asked, self.ask, [session, self.ratio, self.answer], self.what_if, **QUIET)

    def blank(self, summary: str = "") -> Update:
        hidden = gr.Accordion(visible=False)
        return super().blank(summary) | {self.figures: "", self.question: hidden, self.dual: hidden}

    def fill(self, session: Session, shown: Shown) -> Update:
        setattr(session, self.slot, shown)
        parts = views.generation(shown.trace, shown.table, shown.method, csv=self.download)
        visible = gr.Accordion(visible=True)
        return {
            self.summary: parts.summary,
            self.tokens: parts.tokens,
            self.figures: parts.figures,
            self.question: visible,
            self.what_if: views.what_if(shown.table, shown.method, 1.0, True),
            self.dual: visible,
            self.words: parts.words,
            self.ratio: 1.0,
            self.answer: "right",
        }

    def ask(self, session: Session, ratio: float, answer: str) -> str:
        shown: Shown = getattr(session, self.slot)
        return views.what_if(shown.table, shown.method, ratio, answer == "right") if shown.table else ""
