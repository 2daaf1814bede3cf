"""The tab Run shows the place that a reader asked for last, in whatever order the answers would come."""

from __future__ import annotations

import threading

import pytest

from hapo_lite.inspect.tabs import run as run_tab
from tests.inspector.browser import opened_page, pick_run

GROUP = "#run=plain&iteration=1&stage=train&prompt=p"


@pytest.fixture
def opened(browser, address):
    with opened_page(browser, address, tab="") as page:
        page.wait_for_selector("#run-prompts tbody tr")
        yield page


def test_a_slow_answer_does_not_replace_a_later_one(opened, monkeypatch):
    find, slow, asked = run_tab.find, threading.Event(), []

    def waits_at_first(run, place):
        asked.append(place)
        if len(asked) == 1:
            slow.wait(10)
        return find(run, place)

    monkeypatch.setattr(run_tab, "find", waits_at_first)
    pick_run(opened, "plain")
    opened.evaluate("(group) => { location.hash = group; }", GROUP)
    opened.wait_for_timeout(1000)  # enough for the answer to the address, if nothing held it back
    slow.set()
    opened.wait_for_selector("#run-group .hapo-answer")
    opened.wait_for_timeout(500)
    assert opened.locator("#run-group .hapo-answer").first.is_visible()
    assert asked[-1].prompt == "p"
    assert opened.evaluate("location.hash") == GROUP


def test_an_answer_between_a_click_and_its_event_does_not_swallow_the_click(opened):
    opened.evaluate("(group) => { location.hash = group; history.replaceState(null, '', '#run=plain'); }", GROUP)
    opened.wait_for_selector("#run-group .hapo-answer")
    opened.wait_for_function("(group) => location.hash === group", arg=GROUP)
