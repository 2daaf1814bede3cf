"""The page's address: it names the tab and the place in it, and a change of it leads there."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hapo_lite.inspect.places import Place
from hapo_lite.inspect.tabs.generate import GenerateTab
from hapo_lite.inspect.tabs.run import RunTab
from hapo_lite.inspect.tabs.state import IN_ORDER, QUIET, AppState, Session
from hapo_lite.inspect.tabs.view import Update

GENERATE, RUN, RULES, COMPARE = "generate", "run", "rules", "compare"
"""The ids of the tabs."""
OPENED_AT = "(session, address) => [session, window.location.hash]"
ASKED_FOR = "(session, address) => [session, window.HAPO.asked]"
"""OPENED_AT and ASKED_FOR read the address of the page: at its opening, and where a reader wants to go."""


class Navigation:
    """The events of the page's address. The page's script clicks a hidden button whenever the address changes."""

    def __init__(self, app: AppState, tabs: gr.Tabs, generate: GenerateTab, run: RunTab) -> None:
        self.app = app
        self.tabs = tabs
        self.generate = generate
        self.run = run

    def connect(self, blocks: gr.Blocks, session: gr.State) -> None:
        """Connect the address at the opening of the page and at each change of it."""
        address = gr.Textbox(visible="hidden", label="Address")
        button = gr.Button(visible="hidden", elem_id="hapo-go")
        outputs: list[Any] = [self.tabs, *self.generate.outputs, *self.run.outputs]
        inputs = [session, address]
        opened = blocks.load(self.arrive, inputs, outputs, js=OPENED_AT, show_progress="minimal", **IN_ORDER)
        went = button.click(self.go, inputs, outputs, js=ASKED_FOR, **QUIET, **IN_ORDER)
        for filled in (opened, went):
            self.run.complete(filled)

    def arrive(self, session: Session, address: str) -> Update:
        """The whole page at its opening: the recorded group, and the place that the address names, or the first run."""
        update = self.generate.show_example(session, self.generate.example.first)
        if Place.parse(address or "").run not in self.app.runs():
            update |= self.run.refresh(session, self.app.first_run)
        return update | self.go(session, address)

    def go(self, session: Session, address: str) -> Update:
        """The tab and the place that an address names; nothing for an address that names none."""
        place = Place.parse(address or "")
        if place.example is not None:
            return {self.tabs: gr.Tabs(selected=GENERATE), **self.generate.show_example(session, place.example)}
        if place.run not in self.app.runs():
            return {self.tabs: gr.skip()}
        return {
            self.tabs: gr.Tabs(selected=RUN),
            self.run.name: gr.Dropdown(choices=self.app.runs(), value=place.run),
            **self.run.go(session, place),
        }
