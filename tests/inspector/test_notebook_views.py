"""The inspector's views in the output of a notebook."""

from __future__ import annotations

import pytest

from hapo_lite.errors import UserError
from hapo_lite.inspect import inline
from hapo_lite.inspect.runs import open_run
from tests.inspector.browser import WAIT


def test_a_view_in_a_notebook_answers_without_a_server(browser, root):
    run = open_run(root, "hostile")
    page = browser.new_context(viewport={"width": 1000, "height": 700}).new_page()
    page.set_default_timeout(WAIT)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url))
    page.set_content(f"<p>a notebook</p>{inline.completion(run)}")
    page.wait_for_selector("iframe")
    view = page.frames[1]
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    view.hover('.t[data-i="1"]')
    view.wait_for_selector(".hapo-details dt")
    assert "0.2 nats" in view.inner_text(".hapo-details")
    assert view.evaluate("window.attacked") is None and page.evaluate("window.attacked") is None
    assert before == "rgba(0, 0, 0, 0)"  # the notebook keeps its own look
    assert not troubles
    page.context.close()


def test_what_a_view_in_a_notebook_cannot_show_is_named(root, tmp_path):
    run = open_run(root, "plain")
    assert "hapo-cards" in inline.right_against_wrong(run, iteration=0)
    with pytest.raises(UserError, match="iteration 1 has completions 0 to 1, not 2"):
        inline.completion(run, place=2)
    with pytest.raises(UserError, match="no recorded completions of iteration 7: iterations 0, 1 have some"):
        inline.completion(run, iteration=7)
    (tmp_path / "fresh" / "traces").mkdir(parents=True)
    with pytest.raises(UserError, match="no recorded completions: no iteration has any"):
        inline.completion(open_run(tmp_path, "fresh"))
