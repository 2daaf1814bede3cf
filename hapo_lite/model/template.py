"""Chats as text: a tokenizer's chat template, rendered with the options and the date of a run.

A template is a program that comes with the model. transformers runs it in jinja's sandbox, out of reach of Python.
"""

from __future__ import annotations

import datetime
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from hapo_lite.errors import UserError, first_line

Chat = list[dict[str, str]]
"""Messages, each with a `role` and a `content`."""


def today() -> datetime.date:
    """The date of this machine, read once when a policy is loaded."""
    return datetime.date.today()


@dataclass(frozen=True)
class Rendering:
    """How a run renders its chat template.

    options: variables that the template reads, such as enable_thinking. date: the day that the template takes for
    today, so that a run has the same prompts on every day.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date = field(default_factory=lambda: today())

    def strftime_now(self, form: str) -> str:
        """Stands in for the function by which a template asks for the time: midnight of `date`."""
        return datetime.datetime.combine(self.date, datetime.time()).strftime(form)


def templated(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    add_generation_prompt: bool = False,
    rendering: Rendering | None = None,
) -> str:
    """A chat as text, written by the model's chat template. Raises UserError if the template fails."""
    rendering = rendering or Rendering()

    def render(messages: Chat) -> str:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            strftime_now=rendering.strftime_now,
            **rendering.options,
        )
        return cast(str, text)  # other types only with tokenize=True

    try:
        return render(chat)
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        message = f"the chat template of {tokenizer.name_or_path} cannot be applied ({problem})"
        rest = [m for m in chat if m["role"] != "system"]
        if rest != chat and _succeeds(render, rest):
            message += (
                "; it can without the system message: set data.system_prompt=null, and leave system messages out of "
                "the data"
            )
        raise UserError(message) from error


def _succeeds(render: Any, chat: Chat) -> bool:
    try:
        render(chat)
    except Exception:
        return False
    return True


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the chat template; empty if the tokenizer has none. Several named ones count as one text."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        return "\n".join(template.values())
    return template or ""


def reads_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for today's date."""
    return "strftime_now" in template_text(tokenizer)


def check_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Raise UserError for an option that the chat template does not read, or that transformers takes for its own."""
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages", "strftime_now"}
    text = template_text(tokenizer)
    for name in options:
        where = f"model.chat_template_options.{name}"
        if not text:
            raise UserError(f"{where} has no effect: {tokenizer.name_or_path} has no chat template; remove the option")
        if name in taken:
            raise UserError(f"{where} is set by hapo_lite itself: remove the option")
        if not re.search(rf"\b{re.escape(name)}\b", text):
            raise UserError(
                f"{where} is not read by the chat template of {tokenizer.name_or_path}: check its spelling, or remove "
                "the option"
            )


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, rendering: Rendering) -> list[int]:
    """Token ids of a chat, up to the place where the assistant's answer begins.

    Without a chat template the messages stand below each other, after the tokens that the tokenizer puts before a text.
    """
    if tokenizer.chat_template is None:
        return encode_open(tokenizer, "\n\n".join(message["content"] for message in chat) + "\n\n")
    text = templated(tokenizer, chat, add_generation_prompt=True, rendering=rendering)
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    # A template that writes the token which begins a text twice shows the model a text that it was not trained on.
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def after_answer(tokenizer: PreTrainedTokenizerBase, rendering: Rendering | None) -> list[int]:
    """Token ids of what the chat template writes after an answer, such as <|im_end|>; none without a template."""
    if tokenizer.chat_template is None:
        return []
    answer = "answer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    text = templated(tokenizer, chat, rendering=rendering)
    return tokenizer.encode(text.rpartition(answer)[2] if answer in text else "", add_special_tokens=False)


def encode_open(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on: with what the tokenizer puts before a text, without what it puts after it.

    Some tokenizers append their end token, and a prompt that ends in one asks for nothing.
    """
    with_added = tokenizer.encode(text)
    plain = tokenizer.encode(text, add_special_tokens=False)
    added = len(with_added) - len(plain)
    for before in range(added, -1, -1):
        if with_added[before : before + len(plain)] == plain:
            return with_added[: before + len(plain)]
    return with_added


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], hidden: Sequence[int | None]) -> str:
    """The text of token ids without the tokens `hidden`. Every other special token stays, such as <think>."""
    return cast(str, tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False))
