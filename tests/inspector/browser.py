"""What the tests do in a browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import re
import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WAIT = 15_000
"""Milliseconds that anything may take."""


@contextlib.contextmanager
def opened_page(browser, address, tab="Generate", **context):
    """A browser tab; an error of the page's script, or a request to another host, fails what was done with it.

    tab: the page's tab to open; "": the one that the page opens on.
    """
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))
    context.set_default_timeout(WAIT)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request", lambda r: None if re.match(r"data:|blob:|http://127\.0\.0\.1:", r.url) else troubles.append(r.url)
    )
    page.goto(address)
    # One event fills the page: the tab that it opens on, and the tab behind it. On a busy machine it takes long.
    page.wait_for_selector("#generated-tokens .hapo-saves, .hapo-crumbs a, .hapo-crumbs b", timeout=4 * WAIT)
    if tab:
        open_tab(page, tab)
    yield page
    context.close()
    assert not troubles


def filled(page, slot: str) -> None:
    """Waits for the tokens of a finished generation; while it is written they have no buttons."""
    page.wait_for_selector(f"#{slot}-tokens .hapo-saves")


def forget(page, slot: str) -> None:
    """Removes the tokens on the page: what an earlier test of the same tab left must not pass for new ones."""
    page.evaluate(
        "(old) => document.querySelectorAll(old).forEach((node) => node.remove())",
        f"#{slot}-tokens .t, #{slot}-tokens .hapo-saves",
    )


def generated(page) -> None:
    """Generates, and waits for the last token."""
    forget(page, "generated")
    page.click("#generate")
    filled(page, "generated")


def details(page, slot: str) -> dict[str, str]:
    """The numbers of the token that was pointed at, by name."""
    page.wait_for_selector(f"#{slot}-tokens .hapo-details dl")
    names = page.locator(f"#{slot}-tokens .hapo-details dt").all_inner_texts()
    return dict(zip(names, page.locator(f"#{slot}-tokens .hapo-details dd").all_inner_texts(), strict=True))


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def pick_run(page, name: str) -> None:
    """Opens the tab Run and picks a run."""
    open_tab(page, "Run")
    page.locator("#run-name input").click()
    page.get_by_role("option", name=name).click()
    page.wait_for_selector(f"#run-crumbs :text-is('{name}')")


def open_completion(page, stage: str = "") -> None:
    """Opens the first group of the table, or the first one of a stage, and its first completion."""
    page.locator(f"#run-prompts tbody tr:has-text('{stage}') a").first.click()
    page.locator("#run-group .hapo-answer a").first.click()
    filled(page, "opened")
