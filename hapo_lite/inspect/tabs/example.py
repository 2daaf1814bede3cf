"""The recorded group that the page opens on."""

from __future__ import annotations

import functools
from dataclasses import replace

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.inspect import example, group_views, markup
from hapo_lite.inspect.generate import GenerationSettings
from hapo_lite.inspect.groups import groups_of
from hapo_lite.inspect.tokens import token_table
from hapo_lite.inspect.views import Shown


class Example:
    """The group, read once, since all pages show the same one."""

    @functools.cached_property
    def all_shown(self) -> list[Shown]:
        """The completions with their tables."""
        signal_from = "a signal fitted on all tokens of these answers"
        return [
            Shown(trace, replace(token_table(trace), signal_from=signal_from), Method()) for trace in example.load()
        ]

    @property
    def first(self) -> int:
        """The number of the completion that is opened at first: the first right one."""
        right = (i for i, shown in enumerate(self.all_shown) if shown.trace.outcome == "correct")
        return next(right, 0)

    def shown(self, number: int) -> Shown:
        """One completion. number: from 0 on; a number that no completion has stands for the first one to open."""
        return self.all_shown[number if number < len(self.all_shown) else self.first]

    def against_dapo(self) -> tuple[Shown, Shown]:
        """The completion that is opened at first, as recorded under HAPO and as DAPO treats the same tokens."""
        hapo, dapo = self.all_shown[self.first], PRESETS["dapo"]
        trace = example.without_temperature(hapo.trace, dapo)
        return hapo, Shown(trace, replace(token_table(trace, dapo), signal_from=hapo.table.signal_from), dapo)

    def settings(self, shown: Shown) -> GenerationSettings:
        """The settings that a completion was written with."""
        trace = shown.trace
        return GenerationSettings(
            example.PROBLEM, max_new_tokens=example.LONGEST, seed=trace.sample, signal=trace.sampling_signal
        )

    def group_html(self, number: int) -> tuple[str, str]:
        """A sentence on what to look at, and the group. number: of the completion whose tokens stand below."""
        number = number if number < len(self.all_shown) else self.first
        answers = group_views.example_answers(
            [shown.trace for shown in self.all_shown], [shown.table for shown in self.all_shown]
        )
        [group] = groups_of([answer.entry for answer in answers])
        trace = self.all_shown[0].trace
        sentence = (
            f"Recorded: the bundled model answered {trace.messages[-1][1]} {group.size} times, {group.correct} right. "
            "Look at the dark tokens: there the model was unsure, and there the answers part. HAPO gives less credit "
            "to the light ones, which follow by themselves. Click an answer for its tokens, or generate your own."
        )
        return markup.note(sentence, "reading"), group_views.group_page(answers, group, number)
