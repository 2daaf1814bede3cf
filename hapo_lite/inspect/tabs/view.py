"""The parts of a tab that show one generation."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hapo_lite.inspect import markup, views
from hapo_lite.inspect.tabs.state import NO_PROGRESS, QUIET, AppState, Session
from hapo_lite.inspect.tokens import TokenTable
from hapo_lite.inspect.views import Shown

Update = dict[Any, Any]
"""The result of an event: a component and its new content. Other components stay as they are."""
SAVE = "(file) => window.HAPO.save(file.orig_name, file.url)"
"""Browser code that saves a file which the server has written."""


class TokensView:
    """Facts and coloured tokens, with a download of the table. slot: the view's key in `Session.shown`."""

    def __init__(self, app: AppState, slot: str, session: gr.State) -> None:
        self.app = app
        self.slot = slot
        self.summary = gr.HTML(elem_id=f"{slot}-summary")
        self.tokens = gr.HTML(elem_id=f"{slot}-tokens")
        self.outputs: list[Any] = [self.summary, self.tokens]
        # Both are hidden on the page. The button beside the legend clicks this one. The file is written when it is
        # asked for: one that waits for the click could be of an earlier generation.
        asked, file = gr.Button(visible="hidden", elem_id=self.download), gr.File(visible="hidden")
        asked.click(self.write_csv, session, file, **NO_PROGRESS).success(None, file, None, js=SAVE)

    @property
    def download(self) -> str:
        """The id of the hidden button that downloads the table."""
        return f"{self.slot}-csv"

    def blank(self) -> Update:
        """An empty view."""
        return {self.summary: "", self.tokens: ""}

    def streaming(self, table: TokenTable) -> Update:
        """The tokens of a generation that is still being written."""
        return {self.summary: "", self.tokens: markup.token_text(table, streaming=True)}

    def write_csv(self, session: Session) -> str:
        """Write the table that is shown, and return the path of its file."""
        return self.app.csv_file(session, self.slot)


class GenerationView(TokensView):
    """Everything about one generation: the tokens, the figures, the what-if and the dual-entropy words."""

    def __init__(self, app: AppState, slot: str, session: gr.State) -> None:
        super().__init__(app, slot, session)
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

    def blank(self) -> Update:
        """An empty view. The what-if and the words are hidden."""
        hidden = gr.Accordion(visible=False)
        return super().blank() | {self.figures: "", self.question: hidden, self.dual: hidden}

    def fill(self, session: Session, shown: Shown) -> Update:
        """The view of a whole generation, which the session keeps."""
        session.shown[self.slot] = shown
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
        """The what-if figure of the generation that is shown. answer: right or wrong."""
        shown = session.shown.get(self.slot)
        return views.what_if(shown.table, shown.method, ratio, answer == "right") if shown else ""
