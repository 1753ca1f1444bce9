"""Text that comes from models and files, made fit to be shown."""

from __future__ import annotations


def visible(text: str) -> str:
    """Text with its control signs shown and not obeyed: line ends, marks that turn the direction, halves of pairs."""
    return "".join(_picture(sign) for sign in text)


def _picture(sign: str) -> str:
    code = ord(sign)
    if sign == "\n":
        return "⏎"
    if code < 0x20:
        return chr(0x2400 + code)
    turns = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0x200E, 0x200F)
    nothing = 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE
    return "\N{REPLACEMENT CHARACTER}" if turns or nothing else sign


def display_name(model: str) -> str:
    """A model's name without the folders that are its user's own business; a hub id stays whole."""
    own = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return model.rstrip("/").rpartition("/")[2] if own else model
