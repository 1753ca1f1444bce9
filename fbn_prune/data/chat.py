"""A conversation, rendered with the model's own chat template, so that calibration sees what the model sees in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fbn_prune.errors import InvalidInput

_DATES = {"%Y-%m-%d": "2024-07-26", "%d %B %Y": "26 July 2024", "%B %d, %Y": "July 26, 2024"}
_FIXED_DATE = (
    "{%- macro strftime_now(form) -%}{{ "
    + repr(_DATES)
    + ".get(form, '26 Jul 2024') }}{%- endmacro -%}\n"
)
"""Gives templates that write today's date a fixed one: the same text must give the same blocks on another day. It is
the date that Llama's templates fall back to."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes
    ----------
    messages
        One mapping for each turn, with at least `role` and `content`.
    tools
        Tools for the template; None without tools.
    """

    messages: Sequence[Mapping[str, Any]] = field(hash=False)
    tools: Sequence[Any] | None = field(default=None, hash=False)

    def plain(self) -> str:
        """Return the turns as "User: ..." and "Assistant: ...", for models without a chat template."""
        turns = [(str(turn["role"]).capitalize(), turn["content"]) for turn in self.messages]
        return "\n\n".join(f"{role}: {content}" for role, content in turns if content) + "\n"

    def question(self) -> str:
        """Return the longest turn of the user; the whole conversation if there is none."""
        asked = [str(turn["content"]) for turn in self.messages if turn["role"] == "user"]
        return max(asked, key=len, default="") or self.plain()

    def rendered(self, tokenizer: Any, where: str) -> str:
        """Return the conversation in the tokenizer's chat template, or plainly if it has none.

        A template that demands other turns than these gets the system's turn as the beginning of the user's, and turns
        of one role in a row as one. A BOS that the tokenizer puts before every text is left out.

        Raises
        ------
        InvalidInput
            The template refuses the conversation; `where` it is begins the message.
        """
        if not has_template(tokenizer):
            return self.plain()
        text = self._templated(tokenizer, where)
        bos = getattr(tokenizer, "bos_token", None)
        if bos and text.startswith(bos):
            start = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])[:1]
            if start == [tokenizer.bos_token_id]:
                text = text[len(bos) :]
        return text

    def _templated(self, tokenizer: Any, where: str) -> str:
        def apply(messages: Sequence[Mapping[str, Any]]) -> str:
            template = str(tokenizer.get_chat_template(None, self.tools))
            if "strftime_now" in template:
                template = _FIXED_DATE + template
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tools=self.tools, tokenize=False, chat_template=template
                )
            )

        try:  # a template is a program that can raise anything
            return apply(self.messages)
        except Exception as refusal:
            try:
                return apply(_alternating(self.messages))
            except Exception:
                line = " ".join(str(refusal).split())[:200]
                raise InvalidInput(
                    f"{where}: the model's chat template refuses the conversation ({line}); correct or remove it"
                ) from refusal


def turn_texts(tokenizer: Any) -> tuple[str, str] | None:
    """Return what a chat template writes before the user's words, and between these and the assistant's.

    None for a tokenizer without a template, or with one that changes the words or has no such turns.
    """
    if not has_template(tokenizer):
        return None
    asked, answered = "USERWORDS", "ASSISTANTWORDS"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    try:
        text = Chat(turns)._templated(tokenizer, "the template")
    except InvalidInput:
        return None
    before, found, rest = text.partition(asked)
    between, found_too, _ = rest.partition(answered)
    return (before, between) if found and found_too and before and between else None


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _alternating(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the turns as strict templates want them: user and assistant in turn, beginning with the user."""
    turns: list[dict[str, Any]] = []
    before = ""
    for message in messages:
        role, content = message["role"], str(message["content"])
        if role == "system" and not turns:
            before = f"{before}{content}\n\n"
        elif turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        elif turns or role == "user":
            turns.append({**message, "content": before + content})
            before = ""
    return turns
