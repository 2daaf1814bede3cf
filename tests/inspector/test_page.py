"""The inspector's page in a real browser."""

from __future__ import annotations

import json
import re
import time

from hapo_lite.algo.methods import Method
from hapo_lite.inspect import example
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate
from hapo_lite.inspect.runs import open_run
from hapo_lite.inspect.tokens import show_number, token_table, what_if
from hapo_lite.runs.trace import write_traces
from tests.inspector.browser import details, filled, forget, generated, open_completion, open_tab, opened_page, pick_run
from tests.inspector.traces import make_trace

CLICK_AT_ONCE = """(button) => new MutationObserver((_, observer) => {
    const found = document.querySelector(button);
    if (found) { observer.disconnect(); found.click(); }
}).observe(document.body, { childList: true, subtree: true })"""
"""Browser code that clicks a button as soon as it appears: nobody is faster."""


def test_generate_and_read_a_token(page):
    generated(page)
    page.hover("#generated-tokens .t[data-i='2']")
    policy = ModelShelf().get("tiny")
    *_, progress = generate(policy, GenerationSettings("9*7+4=?"))
    table = token_table(progress.trace, tokenizer=policy.tokenizer)
    shown = details(page, "generated")
    assert shown["Entropy"] == show_number(table.numbers["entropy"][2]) + " nats"
    for name, key in {"h": "h", "Temperature": "temperature", "Upper bound": "upper", "Lower bound": "lower"}.items():
        assert shown[name] == show_number(table.numbers[key][2])
    assert page.locator("#generated-tokens .hapo-details table tr").count() == 11
    page.focus("#generated-tokens .t[data-i='0']")
    page.keyboard.press("ArrowRight")
    assert details(page, "generated")["h"] == show_number(table.numbers["h"][1])
    page.click("#generated-tokens .t[data-i='3']")
    assert details(page, "generated")["h"] == show_number(table.numbers["h"][3])


def test_colours_follow_the_chosen_quantity(page):
    generated(page)
    token = page.locator("#generated-tokens .t[data-i='0']")
    assert re.search(r"\bs[0-9a-f]\b", token.get_attribute("class"))
    page.select_option("#generated-tokens .hapo-choose", "h")
    assert re.search(r"\bd[0-9a-f]\b", token.get_attribute("class"))
    assert page.locator("#generated-tokens .hapo-legend:visible").get_attribute("data-name") == "h"
    page.select_option("#generated-tokens .hapo-choose", "entropy")


def test_the_slider_asks_what_if(page):
    generated(page)
    policy = ModelShelf().get("tiny")
    *_, progress = generate(policy, GenerationSettings("9*7+4=?"))
    table = token_table(progress.trace, tokenizer=policy.tokenizer)
    page.fill("#generated-ratio input[type=number]", "1.5")
    page.keyboard.press("Tab")
    page.wait_for_selector("#generated-what-if figcaption:has-text('ratio were 1.5')")
    page.click("#generated-answer label:has-text('wrong')")
    page.wait_for_selector("#generated-what-if figcaption:has-text('answer wrong')")
    drawn = json.loads(page.locator("#generated-what-if .hapo-spec").text_content())["data"][0]["y"]
    assert drawn == what_if(table, Method(), 1.5, -1.0).credit
    page.locator("#generated-what-if").scroll_into_view_if_needed()
    plot = page.locator("#generated-what-if .js-plotly-plot")
    plot.wait_for()
    # A click on a bar shows its token in the text above.
    plot.evaluate("(plot) => plot.emit('plotly_click', { points: [{ x: 3 }] })")
    assert details(page, "generated")["h"] == show_number(table.numbers["h"][3])


def test_downloads(page):
    generated(page)
    with page.expect_download() as table:
        page.click("#generated-tokens .hapo-save[data-kind=csv]")
    assert table.value.path().read_text("utf-8").startswith("position,text,entropy")
    with page.expect_download() as picture:
        page.click("#generated-tokens .hapo-save[data-kind=png]")
    assert picture.value.path().read_bytes().startswith(b"\x89PNG")
    page.locator("#generated-figures .hapo-plot").first.scroll_into_view_if_needed()
    buttons = page.locator("#generated-figures .hapo-plot").first.locator(".modebar-btn")
    with page.expect_download() as numbers:
        buttons.nth(1).click()
    assert numbers.value.path().read_text("utf-8").startswith('"series","x","y"\n')
    with page.expect_download() as figure:
        buttons.nth(0).click()
    assert figure.value.path().read_bytes().startswith(b"\x89PNG")


def test_a_run_opens(page, root):
    pick_run(page, "plain")
    assert page.input_value("#run-iteration input[type=number]") == "1"
    open_completion(page, "train")
    page.wait_for_selector("#opened-tokens .clip-low", state="attached")
    page.hover("#opened-tokens .t[data-i='4']")
    trace = open_run(root, "plain").traces(1)[0][1]
    assert details(page, "opened")["Credit after"] == show_number(trace.tokens["credit"][4])
    page.click("#run-crumbs a:has-text('iteration 1')")
    page.get_by_role("button", name="Training curves").click()
    page.wait_for_selector("#run-curves .hapo-figure")
    assert page.locator("#run-curves .hapo-figure").count() == 1
    clipped = page.locator("#run-treated tr:has-text('clipped low')")
    assert clipped.locator("td").all_inner_texts() == ["clipped low", "1", "·b ×1"]
    page.get_by_role("button", name="Right against wrong").click()
    page.wait_for_selector("#run-right .hapo-card")
    for kind, start in (("csv", b'"completion","outcome","tokens"'), ("png", b"\x89PNG")):
        with page.expect_download() as saved:
            page.click(f"#run-right .hapo-save[data-kind={kind}]")
        assert saved.value.path().read_bytes().startswith(start)
    page.get_by_role("button", name="The same prompt over training").click()
    page.locator("#run-prompt input").click()
    page.get_by_role("option", name=re.compile("eval: p: 2")).click()
    page.wait_for_selector("#run-over .hapo-card >> nth=1")


def test_a_live_run_is_followed_and_a_reader_left_in_peace(page, root):
    pick_run(page, "live")
    page.wait_for_selector("#run-crumbs :text-is('iteration 0')")
    # Taken along from the last iteration to the next.
    write_traces(root / "live" / "traces", 1, [make_trace(iteration=1)])
    page.wait_for_selector("#run-crumbs :text-is('iteration 1')")
    page.fill("#run-iteration input[type=number]", "0")
    page.keyboard.press("Tab")
    page.wait_for_selector("#run-crumbs :text-is('iteration 0')")
    open_completion(page)
    page.hover("#opened-tokens .t[data-i='2']")
    details(page, "opened")
    page.fill("#opened-ratio input[type=number]", "1.5")
    page.keyboard.press("Tab")
    page.wait_for_selector("#opened-what-if figcaption:has-text('ratio were 1.5')")
    write_traces(root / "live" / "traces", 2, [make_trace(iteration=2)])
    page.wait_for_function("document.querySelector('#run-iteration input[type=range]').max === '2'")
    assert page.input_value("#run-iteration input[type=number]") == "0"
    details(page, "opened")
    assert page.input_value("#opened-ratio input[type=number]") == "1.5"


def test_hostile_text_stays_text(page):
    pick_run(page, "hostile")
    page.wait_for_selector("#run-problems .hapo-error:has-text('000000.jsonl:2')")
    page.wait_for_selector("#run-prompts tr:has-text('<img')")
    page.fill("#run-prompts .hapo-search", "</td><script>window.attacked=1</script>")
    page.wait_for_selector("#run-prompts .hapo-count:has-text('0 of 1')")
    page.fill("#run-prompts .hapo-search", '<IMG SRC=X onerror="')
    page.wait_for_selector("#run-prompts .hapo-count:has-text('1 of 1')")
    open_completion(page)
    page.wait_for_selector("#opened-tokens .t:has-text('<script>')")
    assert page.locator("#run-crumbs b:has-text('sample 0')").count() == 1
    for i in range(10):
        page.hover(f"#opened-tokens .t[data-i='{i}']")
    details(page, "opened")
    page.locator("#opened-figures .hapo-plot").first.scroll_into_view_if_needed()
    page.wait_for_selector("#opened-figures .js-plotly-plot")
    assert page.evaluate("window.attacked") is None
    for part in ("opened-tokens", "opened-summary", "run-crumbs"):
        assert page.locator(f"#{part} :is(img, script)").count() == 0
    page.go_back()
    page.wait_for_selector("#run-group .t:has-text('<script>')")
    assert page.locator("#run-group :is(img, script), #run-prompts :is(img, script)").count() == 0
    assert page.evaluate("window.attacked") is None
    page.go_forward()
    filled(page, "opened")
    assert "(100,000 characters)" in page.locator("#opened-tokens .hapo-tokens").inner_text()


def test_compare_marks_differences(page, root):
    open_tab(page, "Compare")
    # It opens on a recorded answer, in the place of which the comparison comes.
    filled(page, "right")
    assert "as DAPO does" in page.locator("#compare-status").inner_text()
    forget(page, "right")
    for button in page.get_by_role("button", name="Model, signal and temperature").all():
        if button.is_visible():
            button.click()
    page.fill("#left-tau input[type=number]", "0.5")
    page.keyboard.press("Tab")
    # On this problem the two sides part at a token where the temperature decides, for any tau from 0.2 up.
    page.locator("input[aria-label='Problem']:visible").fill("3*9+26=?")
    page.keyboard.press("Enter")
    with page.expect_download() as table:
        page.evaluate(CLICK_AT_ONCE, "#right-tokens .hapo-save[data-kind=csv]")
        page.click("#compare")
        filled(page, "right")
    assert table.value.suggested_filename == "tokens-right.csv"
    assert table.value.path().read_text("utf-8").count("\n") == page.locator("#right-tokens .t").count() + 1
    assert page.locator("#left-tokens .differs").count() and page.locator("#right-tokens .differs").count()
    assert "no counterpart" in page.locator("#compare-status").inner_text()
    scale = [page.locator(f"#{side}-tokens .hapo-legend:visible").inner_text() for side in ("left", "right")]
    assert scale[0] == scale[1]
    assert page.locator("#compare-figures .hapo-figure").count() == 2
    page.locator("#right-run input").click()
    page.get_by_role("option", name="live").click()
    page.wait_for_function("document.querySelector('#right-tau input[type=number]').value === '0.2'")
    assert page.input_value("#right-method input") == "dapo"


def test_a_user_error_is_one_sentence(browser, serve):
    with opened_page(browser, serve("--model", "./nowhere")) as page:
        page.click("#generate")
        page.wait_for_selector("#generate-status .hapo-error")
        assert "is not a folder" in page.locator("#generate-status").inner_text()


def test_two_tabs_do_not_disturb_each_other(page, fresh):
    page.locator("input[aria-label='Problem']:visible").fill("3*9+26=?")
    page.keyboard.press("Enter")
    generated(page)
    mine = page.locator("#generated-tokens .hapo-tokens").inner_text()
    assert fresh.locator("#generated-summary").inner_text().count("9*7+4=?")
    assert fresh.locator("#generated-tokens .hapo-tokens").inner_text() != mine
    fresh.locator("input[aria-label='Problem']:visible").fill("2+3*4=?")
    fresh.keyboard.press("Enter")
    generated(fresh)
    assert fresh.locator("#generated-tokens .hapo-tokens").inner_text() != mine
    page.click("#generated-answer label:has-text('wrong')")
    page.wait_for_selector("#generated-what-if figcaption:has-text('answer wrong')")
    assert page.locator("#generated-tokens .hapo-tokens").inner_text() == mine


def test_tokens_stream_in_colour_and_cancel_keeps_them(page, monkeypatch):
    from hapo_lite.inspect.tabs import stream

    def slow(policy, settings):
        for progress in generate(policy, settings):
            time.sleep(0.3)
            yield progress

    monkeypatch.setattr(stream, "generate", slow)
    forget(page, "generated")
    page.click("#generate")
    page.wait_for_selector("#generated-tokens .t[data-i='2']")
    page.select_option("#generated-tokens .hapo-choose", "h")
    page.wait_for_selector("#generated-tokens .t[data-i='3']:is(.d0, .d7, .de, .d1, .d2, .d3, .d4, .d5, .d6)")
    assert page.locator("#generated-tokens .hapo-legend:visible").get_attribute("data-name") == "h"
    page.click("#cancel")
    page.wait_for_selector("#generate-status p:has-text('cancelled')")
    filled(page, "generated")


def test_on_a_phone_a_tap_shows_the_details(browser, address):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened_page(browser, address, **phone) as page:
        generated(page)
        page.tap("#generated-tokens .t[data-i='3']")
        details(page, "generated")
        panel = page.locator("#generated-tokens .hapo-details").bounding_box()
        assert panel["y"] >= 0 and panel["y"] + panel["height"] <= 845
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_it_opens_on_a_recorded_group(browser, serve):
    started = time.monotonic()
    with opened_page(browser, serve(), tab="") as page:
        page.wait_for_selector("#generate-group .hapo-answer")
        answers = page.locator("#generate-group .hapo-answer")
        assert answers.count() == example.GROUP
        assert "1 right" in page.locator("#generate-status").inner_text()
        assert page.locator("#generate-group [aria-current] a").inner_text() == "✓answer 4"
        # A picture of the page shows numbers: those of the most uncertain token, until a reader picks another.
        assert "Entropy" in details(page, "generated")
        page.click("#generate-group .hapo-answer a:has-text('answer 1')")
        page.wait_for_selector("#generate-group [aria-current] a:has-text('answer 1')")
        assert page.evaluate("location.hash") == "#example=0"
        assert "wrong" in page.locator("#generated-summary").inner_text()
        page.go_back()
        generated(page)
        assert page.locator("#generate-group .hapo-answer").count() == 0
    assert time.monotonic() - started < 60


def test_with_a_run_it_opens_on_the_run(browser, address):
    with opened_page(browser, address, tab="") as page:
        page.wait_for_selector("#run-prompts tbody tr")
        assert page.get_by_role("tab", name="Run").get_attribute("aria-selected") == "true"
        assert page.evaluate("location.hash") == "#run=plain"


def test_an_address_leads_back_to_its_view(browser, address, root):
    with opened_page(browser, address, tab="") as page:
        open_completion(page, "train")
        sent = page.url
        assert sent.endswith("#run=plain&iteration=1&stage=train&prompt=p&completion=1")
        page.go_back()
        page.wait_for_selector("#run-group .hapo-answer")
        page.go_back()
        page.wait_for_selector("#run-prompts tbody tr")
        page.go_forward()
        page.wait_for_selector("#run-group .hapo-answer")
        # The slider keeps to the prompt, and the browser goes back from there too.
        page.fill("#run-iteration input[type=number]", "0")
        page.keyboard.press("Tab")
        page.wait_for_selector("#run-crumbs :text-is('iteration 0')")
        assert page.evaluate("location.hash") == "#run=plain&iteration=0&stage=train&prompt=p"
        page.go_back()
        page.wait_for_selector("#run-crumbs :text-is('iteration 1')")
    with opened_page(browser, sent, tab="") as page:
        filled(page, "opened")
        assert page.locator("#run-crumbs b").inner_text() == "sample 0"


def test_the_table_of_prompts_is_sorted_filtered_and_searched(page, root):
    kinds = {"easy": ["correct"] * 2, "mixed": ["correct", "wrong"], "hard": ["wrong", "unparseable"]}
    traces = [
        make_trace(["x"] * (3 - i), prompt_id=name, sample=i, outcome=kind, reward=float(kind == "correct"))
        for name, kinds_of in kinds.items()
        for i, kind in enumerate(kinds_of)
    ]
    for trace in traces:
        trace.messages[:] = [("user", f"{trace.prompt_id} question")]
    write_traces(root / "table" / "traces", 0, traces)
    page.reload()
    pick_run(page, "table")
    rows = page.locator("#run-prompts tbody tr:visible a")
    page.wait_for_selector("#run-prompts tbody tr:nth-child(3)")
    assert rows.all_inner_texts() == ["easy·question", "mixed·question", "hard·question"]
    right = page.get_by_role("columnheader", name="right")
    page.get_by_role("button", name="right", exact=True).click()
    assert right.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="right", exact=True).click()
    assert rows.all_inner_texts() == ["hard·question", "mixed·question", "easy·question"]
    page.select_option("#run-prompts .hapo-filter", "wrong")
    assert rows.all_inner_texts() == ["hard·question", "mixed·question"]
    page.select_option("#run-prompts .hapo-mix", "mixed")
    assert page.locator("#run-prompts .hapo-count").inner_text() == "1 of 3 prompts"
    page.select_option("#run-prompts .hapo-mix", "")
    page.fill("#run-prompts .hapo-search", "HARD")
    assert rows.all_inner_texts() == ["hard·question"]
    page.click("#run-prompts tbody tr:visible td:nth-child(2)")
    page.wait_for_selector("#run-group .hapo-answer")
    # They agree in two tokens; then one goes on, and the other has ended.
    assert page.locator("#run-group .t.alone").all_inner_texts() == ["x"]


def test_a_token_keeps_its_numbers(page):
    generated(page)
    page.click("#generated-tokens .t[data-i='3']")
    kept = details(page, "generated")
    page.hover("#generated-tokens .t[data-i='1']")
    assert details(page, "generated") != kept
    page.hover("#generate")
    assert details(page, "generated") == kept
