"""Why the page's memory stays flat: every value that an event gives becomes an update of its component.

When an event leaves a component as it is, or updates one of its properties, gradio (6.31) makes the component anew for
the session. The next plain value is then stored under the id of that new component, beside all earlier ones, for as
long as the session lasts. Updates replace one another.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.utils import is_prop_update


def give_updates(blocks: gr.Blocks) -> None:
    """Have every event of the page give updates. Called once, when the page is built."""
    for event in blocks.fns.values():
        if event.fn is not None:
            event.fn = giving_updates(event.fn, event.outputs)


def giving_updates(fn: Callable[..., Any], outputs: Sequence[Any]) -> Callable[..., Any]:
    """The event `fn`, whose plain values become updates of its outputs."""
    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def stream(*arguments: Any) -> Iterator[Any]:
            for result in fn(*arguments):
                yield _updates(result, outputs)

        return stream

    @functools.wraps(fn)
    def once(*arguments: Any) -> Any:
        return _updates(fn(*arguments), outputs)

    return once


def _updates(result: Any, outputs: Sequence[Any]) -> Any:
    """The result of an event with updates in place of plain values: by component, in a list, or of a single output."""
    if isinstance(result, dict) and result and all(isinstance(key, Block) for key in result):
        return {component: _update(component, value) for component, value in result.items()}
    if len(outputs) == 1:
        return _update(outputs[0], result)
    if isinstance(result, list):
        return [_update(component, value) for component, value in zip(outputs, result, strict=True)]
    return result


def _update(component: Any, value: Any) -> Any:
    if component.stateful or isinstance(value, Block) or is_prop_update(value):
        return value
    return gr.update(value=value)
