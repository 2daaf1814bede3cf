"""Fork here, in a browser and as HTML: the numbers of `fork`, hostile text, cancelling, a refusal."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from types import ModuleType, SimpleNamespace

import pytest

from hapo_lite.algo.methods import Method
from hapo_lite.errors import UserError
from hapo_lite.inspect import fork_view
from hapo_lite.inspect.fork import CANCELLED, Branch, Continuation, Fork, ForkSettings, fork, processor_of
from hapo_lite.inspect.fork_view import Given
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate
from hapo_lite.inspect.tabs import fork as fork_tab
from hapo_lite.inspect.tabs import loading
from hapo_lite.tiny.bundled import TASKS
from tests.inspector.browser import generated, opened_page
from tests.inspector.traces import HOSTILE

ATTACK = '<img src=x onerror="window.attacked=1"><script>window.attacked=1</script>'


def made_up(texts, right: int = 2, ended: str = "whole", gold: bool = True) -> Fork:
    """A fork with these tokens, four continuations each, `right` of them right after the first one."""
    branches = []
    for i, text in enumerate(texts):
        outcomes = ["correct"] * (right if i == 0 else 1) + ["wrong", "unparseable", "wrong", "wrong"]
        written = [Continuation(text, outcome if gold else "", text, False) for outcome in outcomes[:4]]
        branches.append(Branch(i, text, 1.0 / len(texts), i == 0, False, tuple(written)))
    return Fork(ForkSettings(0, continuations=4), texts[-1], tuple(branches), gold, ended)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("gold", [True, False])
def test_hostile_text_stays_text(gold):
    def parsed(texts) -> Tags:
        tags = Tags()
        tags.feed(fork_view.fork_html(made_up(texts, gold=gold), Given(1.0, True if gold else None)))
        return tags

    plain, hostile = parsed(["a"] * 8), parsed([*HOSTILE, ATTACK, "\u202eabc"])
    assert hostile.seen == plain.seen and hostile.attributes == plain.attributes


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_to_a_built_in_problem_is_known(name):
    for problem in TASKS[name].problems("test")[:3]:
        assert fork_tab.known_answer(f" {problem.prompt}\n") == str(problem.answer)
    assert fork_tab.known_answer("9*7+4") == fork_tab.known_answer("") == ""


def test_a_further_built_in_task_is_known_without_a_change(monkeypatch):
    spell = SimpleNamespace(prompt="spell 7", answer="seven")
    other = ModuleType("other")
    other.all_problems = lambda: (spell,)
    monkeypatch.setattr(fork_tab, "TASKS", {**TASKS, "other": other})
    assert [fork_tab.known_answer(text) for text in ("spell 7", "9*7+4=?", "spell 8")] == ["seven", "67", ""]


def test_the_sentence_and_the_verdict_follow_the_numbers():
    found = made_up([" 7", " 9", " 8"], right=0)
    page = fork_view.fork_html(found, Given(1.4, False))
    lead = re.sub("<[^>]*>", "", re.search(r'<p class="hapo-fork-lead".*?</p>', page).group())
    assert lead == "After ·7, as it said: 0 of 4 right. Had it said ·9: 1 of 4 right."
    assert "hold" in page and "these continuations do not tell" in page  # 0 of 4 against 1 of 4
    rows = page.partition("<tbody>")[2].partition("</tbody>")[0]
    assert [rows.count(f'class="{kind}"') for kind in ("right", "wrong", "none")] == [2, 7, 3]
    low = Fork(found.settings, "", tuple(_with(b, 24 * i) for i, b in enumerate(found.branches)), True, "whole")
    assert "lowered the chance of a right answer, and HAPO&#x27;s credit has the same sign" in fork_view.fork_html(
        low, Given(1.4, False)
    )
    assert "has the other sign" in fork_view.fork_html(low, Given(1.4, True))
    assert 'class="due"' in fork_view.fork_html(
        Fork(ForkSettings(0, continuations=9), "", found.branches, True), Given(1.0, None)
    )


def _with(branch: Branch, right: int) -> Branch:
    outcomes = ["correct"] * min(right, 24) + ["wrong"] * (24 - min(right, 24))
    return Branch(branch.token, branch.text, branch.probability, branch.sampled, False,
                  tuple(Continuation("", o, None, False) for o in outcomes))  # fmt: skip


def test_a_token_is_forked(page):
    generated(page)
    page.click("#generated-tokens .t[data-i='7']")
    assert page.input_value("#fork-position input") == "7"
    assert page.locator("#generated-tokens .fork-at").get_attribute("data-i") == "7"
    assert page.input_value("#fork-gold textarea, #fork-gold input") == "67"
    page.click("#fork-start")
    page.wait_for_selector("#fork-result .hapo-fork details")
    policy = ModelShelf().get("tiny")
    *_, progress = generate(policy, GenerationSettings("9*7+4=?"))
    *_, expected = fork(policy, progress.trace, ForkSettings(7, "67"), processor_of(progress.trace, Method(), 1.0))
    shown = page.locator("#fork-result .share > b").all_inner_texts()
    assert shown == [f"{branch.right} of 24 right" for branch in expected.branches]
    rows = page.locator("#fork-result tbody tr")
    for i, branch in enumerate(expected.branches):
        assert rows.nth(i).locator(".hapo-squares .right").count() == branch.right
    assert "·Take" not in page.locator("#fork-result .hapo-fork-said").inner_text()
    assert "120 of 120" in page.locator("#fork-status").inner_text()
    page.fill("#fork-tokens input", "100000")
    page.keyboard.press("Tab")
    page.click("#fork-start")
    page.wait_for_selector("#fork-status .hapo-error:has-text('more than the 131,072')")
    page.fill("#fork-tokens input", "256")
    page.keyboard.press("Tab")


def test_a_fork_streams_cancels_and_keeps_text_as_text(page, monkeypatch):
    def slow(policy, trace, settings, processor, cancelled):
        while not cancelled():
            time.sleep(0.1)
            yield made_up([ATTACK, *HOSTILE], ended="")
        yield made_up([ATTACK, *HOSTILE], ended=CANCELLED)

    monkeypatch.setattr("hapo_lite.inspect.tabs.fork.fork", slow)
    generated(page)
    page.click("#fork-start")
    page.wait_for_selector("#fork-result .hapo-fork-legend:has-text('provisional')")
    assert page.locator("#fork-result details").count() == 0
    page.click("#fork-cancel")
    page.wait_for_selector("#fork-status:has-text('cancelled')")
    page.click("#fork-result summary")
    assert page.evaluate("window.attacked") is None
    assert page.locator("#fork-result img, #fork-result script").count() == 0
    assert "<script>" in page.locator("#fork-result li").first.inner_text()


def test_on_a_phone_a_fork_is_as_wide_as_the_page(browser, address):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened_page(browser, address, **phone) as page:
        generated(page)
        page.tap("#generated-tokens .t[data-i='5']")
        page.tap("#fork-start")
        page.wait_for_selector("#fork-result .hapo-fork details")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_model_that_loads_is_named_with_its_size_and_an_error_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "EVERY_SECONDS", 0.05)
    (tmp_path / "<b>").mkdir()
    (tmp_path / "<b>" / "model.safetensors").write_bytes(b"0" * 5_000_000)
    notes = list(loading.loading(lambda: time.sleep(0.2), str(tmp_path / "<b>")))
    assert notes and "Loading &lt;b&gt;, 0.005 GB of weights: 0 s." in notes[0]
    assert "Loading tiny:" in next(iter(loading.loading(lambda: time.sleep(0.2), "tiny")))

    def fail():
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        list(loading.loading(fail, "nowhere"))
