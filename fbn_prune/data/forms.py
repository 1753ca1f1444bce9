"""Turn records into documents: a field of text, or a conversation in one of the usual forms of fine-tuning data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fbn_prune.data.chat import Chat, has_template
from fbn_prune.data.text_files import is_text
from fbn_prune.errors import InvalidInput

Document = str | Chat
Form = tuple[str, ...]
"""The fields that hold a record's text, or its question and answer."""

CHAT_FIELDS = ("messages", "conversations", "conversation")
_ASKING = ("instruction", "prompt")
_ANSWERING = ("output", "response", "completion")
_AS_ONE_TEXT = {("question", "answer"): "\n", ("prompt", "completion"): ""}
"""Pairs that are one text, and what ends it; other pairs are conversations of two turns."""

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""ShareGPT's names of roles and those of chat templates."""


@dataclass(frozen=True)
class Reading:
    """How to read documents.

    Attributes
    ----------
    tokenizer
        Its chat template renders conversations; None renders them plainly.
    note
        Called with a line for the user about what was found in a source.
    """

    tokenizer: Any = None
    note: Callable[[str], None] = lambda line: None
    _said: set[str] = field(default_factory=set)

    def say(self, line: str) -> None:
        """Note a line, once."""
        if line not in self._said:
            self._said.add(line)
            self.note(line)

    def rendered(self, document: Document, where: str) -> str:
        """Return a document as text."""
        return document.rendered(self.tokenizer, where) if isinstance(document, Chat) else document

    def say_form(self, source: str, maker: DocumentMaker, document: Document) -> None:
        """Say which fields the documents of a source are taken from, and how conversations are rendered."""
        what = "text" if isinstance(document, str) else "conversations"
        fields = " and ".join(map(repr, maker.form or ()))
        words = f"{what} in {fields or 'its strings'}"
        if isinstance(document, Chat):
            words += rendering_words(self.tokenizer)
        self.say(f"{source}: {words}")


def rendering_words(tokenizer: Any) -> str:
    """Return how conversations are rendered, as the end of a line for the user."""
    if has_template(tokenizer):
        return ", rendered with the model's chat template"
    return (
        '; the model has no chat template, so turns are written as "User: ..." and "Assistant: ..."'
    )


class DocumentMaker:
    """Makes documents of the records of one source, all of the form that the first one has.

    Parameters
    ----------
    named
        The field that the user named; None to find one.
    cure
        What to do if there is no text, for error messages.
    noun
        What the source calls its fields.
    """

    def __init__(self, named: str | None, *, cure: str, noun: str = "text field") -> None:
        self.form: Form | None = None if named is None else (named,)
        self.cure, self._noun = cure, noun

    def __call__(self, where: str, record: Any) -> Document | None:
        """Return a record's document, which a string is itself; None if its field is null.

        Parameters
        ----------
        where
            Where the record is, for error messages.
        record
            The record.

        Raises
        ------
        InvalidInput
            The record has no text in the source's form.
        """
        if self.form is None:
            if isinstance(record, str):
                return checked(record, where, "text")
            self.form = form_of(record)
        form = self.form or ("text",)
        if not isinstance(record, Mapping) or any(key not in record for key in form):
            named = " and ".join(map(repr, form))
            raise InvalidInput(f"{where}: no {self._noun} {named} {found(record)}; {self.cure}")
        if any(record[key] is None for key in form):
            return None
        return _document(record, form, where)


def form_of(record: Any) -> Form | None:
    """Return the form of a record's text; None if it has none that is known."""
    if not isinstance(record, Mapping):
        return None
    if isinstance(record.get("text"), str):
        return ("text",)
    for key in CHAT_FIELDS:
        if _turns_in(record.get(key)):
            return (key,)
    for ask in _ASKING:
        for answer in _ANSWERING:
            both = record.get(ask), record.get(answer)
            texts = all(isinstance(value, str) for value in both)
            if texts or all(isinstance(value, list) and _turns_in(value) for value in both):
                return (ask, answer)
    if all(isinstance(record.get(key), str) for key in ("question", "answer")):
        return ("question", "answer")
    return None


def found(record: Any) -> str:
    """Return the fields of a record in parentheses, for error messages."""
    names = ", ".join(sorted(map(str, record))) if isinstance(record, Mapping) else "no object"
    return f"(found: {names if len(names) <= 200 else names[:197] + '...'})"


def _document(record: Mapping[str, Any], form: Form, where: str) -> Document:
    values = [record[key] for key in form]
    if all(isinstance(value, str) for value in values):
        texts = [checked(value, where, key) for key, value in zip(form, values, strict=True)]
        if form in _AS_ONE_TEXT:
            return "".join(texts) + _AS_ONE_TEXT[form]
        if len(form) == 2:
            return _answered(record, texts[0], texts[1], where)
        if form[0] not in CHAT_FIELDS or _turns_in(values[0]) is None:
            return texts[0]
    turns: list[Any] = []
    for key, value in zip(form, values, strict=True):
        found_turns = _turns_in(value)
        if found_turns is None:
            raise InvalidInput(
                f"{where}: {key!r} holds {_kind_of(value)}, neither text nor the turns of a conversation; "
                "correct the record, or name another field"
            )
        turns += found_turns
    return _chat(record, [_turn(turn, where) for turn in turns])


def _answered(record: Mapping[str, Any], ask: str, answer: str, where: str) -> Chat:
    """Return an instruction, with its input if it has one, and the answer."""
    more = record.get("input") if "instruction" in record else None
    if isinstance(more, str) and more.strip():
        ask = f"{ask}\n\n{checked(more, where, 'input')}"
    return _chat(
        record, [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    )


def _chat(record: Mapping[str, Any], turns: list[dict[str, Any]]) -> Chat:
    system, tools = record.get("system"), record.get("tools")
    has_system = isinstance(system, str) and is_text(system) and bool(system.strip())
    if has_system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return Chat(tuple(turns), tools if isinstance(tools, list) and tools else None)


def _turns_in(value: Any) -> list[Any] | None:
    """Return a field's list of turns, which tables also store as JSON text; None if it holds none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    are_turns = [isinstance(turn, Mapping) and {"role", "from"} & turn.keys() for turn in value]
    return value if all(are_turns) else None


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a turn with `role` and `content`, without the nulls that tables put into absent fields."""
    role = turn.get("role") or turn.get("from")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(text for text in texts if isinstance(text, str))
        if not all(isinstance(text, str) for text in texts):
            raise InvalidInput(
                f"{where}: a turn holds more than text, such as an image; remove the conversation"
            )
    if not isinstance(role, str) or not (content is None or isinstance(content, str)):
        raise InvalidInput(
            f"{where}: the role and the content of a turn must be text; correct or remove it"
        )
    kept = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in ("from", "value")
    }
    role = _ROLES.get(checked(role, where, "role"), role)
    return kept | {"role": role, "content": checked(content or "", where, "content")}


def checked(text: str, where: str, name: str) -> str:
    """Return a text; refuse one that no file could hold.

    Raises
    ------
    InvalidInput
        It has a NUL or a lone surrogate.
    """
    if not is_text(text):
        raise InvalidInput(f"{where}: {name!r} contains a NUL or a lone surrogate; remove it")
    return text


def _kind_of(value: Any) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", bool: "a truth value"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)
