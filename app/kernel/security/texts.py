"""
Texts from outside, as they can be kept and shown: logs, error messages, names that a file or a driver gives.

Postgres keeps no NUL, UTF-8 has no lone surrogate, and a terminal acts on control characters. What cannot be kept is
replaced by U+FFFD, so that a reader sees that something stood there. Every text that this system did not write itself,
and that goes into a column, passes through here; a value of a client that cannot be kept is refused instead.
"""

from __future__ import annotations

import re

#: Stands in the place of a character that cannot be kept.
REPLACEMENT = "\ufffd"

#: What is put at the end of a text that was cut.
_CUT = "…"
#: NUL, and halves of surrogate pairs.
_NOT_KEPT = re.compile("[\x00\ud800-\udfff]")
#: The same, and all other control characters except tab and newline.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
#: What terminals read as colours and movements of the cursor (ECMA-48, section 5.4).
_SEQUENCE = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")


def storable(text: str, most: int | None = None) -> str:
    """The text as Postgres can keep it, with at most `most` characters; one that was cut ends in `…`."""
    return _NOT_KEPT.sub(REPLACEMENT, _cut(text, most))


def printable(text: str, most: int | None = None) -> str:
    """The same, and harmless to a terminal: colours are removed, other control characters replaced."""
    return _NOT_SHOWN.sub(REPLACEMENT, _cut(_SEQUENCE.sub("", text), most))


def _cut(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else text[: max(most - len(_CUT), 0)] + _CUT
