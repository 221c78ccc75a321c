"""
Texts from outside, made safe to store and to print: logs, error messages, names from a file or a driver.

Postgres cannot store NUL, UTF-8 cannot encode lone surrogates, and terminals execute control characters. Such a
character is replaced by U+FFFD, so that a reader sees that something was there. Every text from outside that is stored
in a column passes through here; a client's value that cannot be stored is refused instead.
"""

from __future__ import annotations

import re

#: The replacement of a character that cannot be stored.
REPLACEMENT = "\ufffd"

#: The end of a text that was cut.
_CUT = "…"
#: NUL and lone surrogates.
_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")
#: The same, and all other control characters except tab and newline.
_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
#: Control sequences of terminals, for colours and cursor movements (ECMA-48, section 5.4).
_SEQUENCE = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")


def storable(text: str, max_characters: int | None = None) -> str:
    """Return the text in a form that Postgres can store; a text over `max_characters` is cut and ends with `…`."""
    return _NOT_STORABLE.sub(REPLACEMENT, _cut(text, max_characters))


def printable(text: str, max_characters: int | None = None) -> str:
    """As `storable`, and safe for a terminal: control sequences are removed, control characters replaced."""
    return _NOT_PRINTABLE.sub(REPLACEMENT, _cut(_SEQUENCE.sub("", text), max_characters))


def _cut(text: str, max_characters: int | None) -> str:
    if max_characters is None or len(text) <= max_characters:
        return text
    return text[: max(max_characters - len(_CUT), 0)] + _CUT
