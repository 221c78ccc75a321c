"""
Kinds of memories, of their sources and of what happens to them; and which texts say the same.

Two texts that differ only in case, blanks and the marks around their words say the same.
"""

from __future__ import annotations

import hashlib
import unicodedata
from enum import StrEnum

#: Most characters of a memory: a statement, not a document.
MAX_TEXT = 2_000
#: Most characters of the name of a user, of that of an author, and of a note.
MAX_USER, MAX_AUTHOR, MAX_NOTE = 200, 200, 500
#: Most sources of one memory.
MAX_SOURCES = 100
#: Marks around a word that do not change what it says. Those of `C++`, `C#` and `-5` do.
_MARKS = ".,;:!?\u2026\"'\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb()[]{}*_`~"


class MemoryKind(StrEnum):
    """What a memory states."""

    FACT = "fact"
    #: What somebody likes, or how they want something done.
    PREFERENCE = "preference"
    DECISION = "decision"
    #: An insight that changed the work; marked by hand or by a model.
    BREAKTHROUGH = "breakthrough"
    #: What happens again and again.
    PATTERN = "pattern"


class MemoryOrigin(StrEnum):
    """What a source of a memory is."""

    MESSAGE = "message"
    RUN = "run"
    HAND = "hand"


class MemoryEvent(StrEnum):
    """What happened to a memory."""

    REMEMBERED = "remembered"
    INVALIDATED = "invalidated"
    SUPERSEDED = "superseded"
    #: It was marked as a breakthrough, or is one no more.
    MARKED = "marked"
    UNMARKED = "unmarked"
    #: It was found again: it has more sources, and its confidence has changed.
    REINFORCED = "reinforced"


def normalised(text: str) -> str:
    """Return a text without regard to case, blanks, and the marks around its words."""
    words = (word.strip(_MARKS) for word in unicodedata.normalize("NFKC", text).casefold().split())
    return " ".join(word for word in words if word) or text.strip()


def text_hash(text: str) -> str:
    """Return the hash of a normalised text, in hexadecimal digits."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()
