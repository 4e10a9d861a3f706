"""Text that comes from files and goes to terminals and pages: what may be in it, and the rest as escapes.

Escape sequences, line breaks and characters that nobody sees, such as those that turn the direction of writing, can
make a terminal or a page show something else than a file holds.
"""

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of Unicode: controls, invisible formatting, halves of surrogate pairs, separators of lines."""

_JOINERS = "\u00ad\u200c\u200d\u200e\u200f"
"""Formatting that words and emoji are written with: hyphenation, joining, and the direction of one character."""


def is_printable(text: str) -> bool:
    """Whether a text is one line of characters that can be seen, blanks of all widths included."""
    return not any(_is_hidden(character) for character in text)


def escape_hidden(text: str) -> str:
    r"""The text with `\x1b`, `\n` and their like in the places of characters that cannot be seen."""
    return "".join(ascii(character)[1:-1] if _is_hidden(character) else character for character in text)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS
