"""Make text from models and files fit for display."""

from __future__ import annotations


def visible(text: str) -> str:
    """Replace control characters, direction marks and lone surrogates by visible symbols."""
    return "".join(_symbol(character) for character in text)


def _symbol(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "⏎"
    if code < 0x20:
        return chr(0x2400 + code)
    is_direction_mark = (
        0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0x200E, 0x200F)
    )
    is_invisible = 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE
    return "\N{REPLACEMENT CHARACTER}" if is_direction_mark or is_invisible else character
