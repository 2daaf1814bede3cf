"""One rule against another: the numbers of the run that recorded them, cases by hand, and the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.errors import UserError
from hapo_lite.inspect import rules_view
from hapo_lite.inspect.rules import AS_IN_RUN, choose_rule, compare_rules, ruled, updated
from hapo_lite.inspect.runs import open_run
from hapo_lite.inspect.tokens import token_table
from hapo_lite.train.run import train
from tests.inspector.browser import open_tab
from tests.inspector.traces import HOSTILE, make_trace, trained


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hapo", "entropy_adv", "forking_tokens", "gspo", "dppo", "stare", "dr_grpo"])
def test_a_runs_own_rule_gives_what_the_run_recorded(preset, make_recipe):
    recipe = make_recipe(
        f"method={preset}",
        "training.iterations=2",
        "training.learning_rate=0.02",
        "logging.traces_per_iteration=16",
        "rollout.dynamic_sampling=false",
    )
    train(recipe)
    run = open_run(Path(recipe.output_dir), recipe.name)
    seen = 0
    for iteration in run.iterations():
        traces = updated(run.traces(iteration)[0])
        for trace, found in zip(traces, ruled(traces, run.settings.method), strict=True):
            tokens = trace.tokens
            assert found.credit == pytest.approx(tokens["credit"], rel=2e-6, abs=1e-7)
            assert found.lower == pytest.approx(tokens["lower"], rel=1e-6)
            assert found.upper == pytest.approx(tokens["upper"], rel=1e-6)
            moved = [i for i, credit in enumerate(tokens["credit"]) if credit]
            assert [found.clipped[i] for i in moved] == [tokens["clipped"][i] for i in moved]
            seen += len(moved)
    assert seen > 20


def test_a_method_that_draws_its_tokens_is_refused_since_a_trace_lacks_the_draws():
    for name in ("random_tokens", "clip_cov"):
        with pytest.raises(UserError, match="no rule"):
            choose_rule(name, PRESETS["hapo"])
        with pytest.raises(UserError, match="draws its tokens at random"):
            choose_rule(AS_IN_RUN, PRESETS[name])


def by_hand():
    """Two completions of an iteration: A = 0.5 and A = -1, ratios inside, beyond GRPO's bounds, beyond both."""
    first = trained(make_trace(), PRESETS["dapo"], 0.5, [1.0, 1.25, 1.5, 0.5, 1.1, 1.0])
    second = trained(make_trace(), PRESETS["dapo"], -1.0, [1.0, 1.25, 1.5, 0.5, 0.85, 12.0])
    return [first, second]


def test_grpo_against_dapo_by_hand():
    found = compare_rules(by_hand(), PRESETS["grpo"], PRESETS["dapo"])
    # A > 0: above 1.2 GRPO stops, above 1.28 DAPO too. A < 0: both stop below 0.8, DAPO's dual clip at 10.
    assert found.left[0].treatment == ["kept", "stopped high", "stopped high", "kept", "kept", "kept"]
    assert found.right[0].treatment == ["kept", "kept", "stopped high", "kept", "kept", "kept"]
    assert found.left[1].treatment == ["kept", "kept", "kept", "stopped low", "kept", "kept"]
    assert found.right[1].treatment == ["kept", "kept", "kept", "stopped low", "kept", "stopped high"]
    assert found.tokens == 12 and found.differing == 2
    assert found.pairs["stopped high", "kept"] == 1 and found.pairs["kept", "stopped high"] == 1
    # ratio x A / 12 tokens under DAPO; ratio x A / 6 tokens / 2 completions under GRPO.
    assert found.right[0].gradient == pytest.approx([r * 0.5 / 12 for r in (1.0, 1.25, 0.0, 0.5, 1.1, 1.0)])
    assert found.left[1].gradient == pytest.approx([-r / 12 for r in (1.0, 1.25, 1.5, 0.0, 0.85, 12.0)])


def test_quadrants_by_hand():
    # Of the entropies 1.2, 0.3, 1e-4, 0.02, 2.0, 1e-6 the 0.8 quantile is 1.2: only 2.0 lies above it.
    found = compare_rules(by_hand(), PRESETS["grpo"], PRESETS["dapo"]).quadrants
    assert {place: one.tokens for place, one in found.items()} == {
        (True, True): 1,
        (True, False): 1,
        (False, True): 5,
        (False, False): 5,
    }
    up, down = 0.5 * (1.0 + 1.25 + 0.5 + 1.1 + 1.0), 1.0 + 1.25 + 1.5 + 0.85
    assert found[True, True].right == pytest.approx(0.55 / (up + down))
    assert found[False, False].right == pytest.approx((down - 0.85) / (up + down))
    assert sum(one.left for one in found.values()) == pytest.approx(1.0)


def test_hapo_amplifies_and_suppresses():
    # Ratio 1 lies inside the neutral zone: certain tokens are suppressed. The uncertain one has moved: amplified.
    trace = trained(make_trace(), Method(), 0.5, [1.0, 1.0, 1.0, 1.0, 1.3, 1.0])
    [found] = ruled([trace], Method())
    assert found.treatment == ["kept", "suppressed", "suppressed", "suppressed", "amplified", "left out"]
    assert found.credit[4] == pytest.approx(1.0) and found.credit[5] == 0.0
    [forking] = ruled([trace], PRESETS["forking_tokens"])
    assert forking.treatment == ["left out"] * 4 + ["stopped high", "left out"]
    [public] = ruled([trace], PRESETS["hapo_public_code"])
    assert public.credit[3] == 0.5 > found.credit[3]


def test_a_rule_fits_the_recorded_signal_and_unknown_ones_are_refused():
    own = Method(quantile=0.6, tau=0.2)
    assert choose_rule(AS_IN_RUN, own) is own
    assert choose_rule("dapo", own).quantile == 0.6
    with pytest.raises(UserError, match="there is no rule <b>"):
        choose_rule("<b>", own)
    with pytest.raises(UserError, match="nothing to compare"):
        compare_rules([make_trace()], own, own)
    assert updated([make_trace()]) == []


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, ...]] = set()

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.add((tag, *sorted({name for name, _ in attrs} - {"selected", "hidden"})))


def test_hostile_text_stays_text():
    def parsed(texts, name: str) -> set:
        trace = trained(make_trace(texts), Method(), 0.5, [1.0, 1.0, 1.0, 0.6, 1.3, 1.0])
        found = compare_rules([trace], Method(), PRESETS["dapo"])
        tags = Tags()
        tags.feed(rules_view.comparison_html(found, (name, name), 1))
        tags.feed(rules_view.text_html(token_table(trace), found.left[0], found.right[0], name))
        return {seen for seen in tags.seen if seen[0] != "wbr"}

    assert parsed(HOSTILE, "<script>alert(1)</script>") == parsed(["a"] * 6, "dapo")


def test_two_rules_side_by_side(page, root):
    open_tab(page, "Rules")
    page.click("#rules-start")
    page.wait_for_selector("#rules-right-text .hapo-saves")
    trace = updated(open_run(root, "plain").traces(1)[0])
    found = compare_rules(trace, Method(), PRESETS["dapo"])
    lead = page.locator("#rules-result .hapo-rules-lead").inner_text()
    assert lead.startswith(f"{found.differing} of {found.tokens} tokens")
    for side, own in (("left", found.left[0]), ("right", found.right[0])):
        text = page.locator(f"#rules-{side}-text .hapo-tokens")
        pairs = zip(found.left[0].treatment, found.right[0].treatment, strict=True)
        assert text.locator(".differs").count() == sum(one != other for one, other in pairs)
        assert text.locator(".clip-low, .clip-high").count() == sum(map(bool, own.clipped))
    legends = [page.locator(f"#rules-{side}-text .hapo-legend:visible") for side in ("left", "right")]
    assert [one.get_attribute("data-name") for one in legends] == ["credit", "credit"]
    assert legends[0].inner_text() == legends[1].inner_text()
    cells = page.locator("#rules-result .hapo-quadrants strong").all_inner_texts()
    assert [re.match(r"\d+", cell).group() for cell in cells] == [str(q.tokens) for q in found.quadrants.values()]
    page.locator("#rules-run input").click()
    page.get_by_role("option", name="hostile").click()
    page.click("#rules-start")
    page.wait_for_selector("#rules-result .hapo-error:has-text('nothing to compare')")
