"""
What can be recalled: texts of messages, memories, blocks and documents, in parts of bounded size.

A long text is split between its sentences into parts; nothing is left out. The bound is one of characters, because
whoever writes a text needs no model; it is chosen so that a part fits the 256 tokens of small embedding models. A part
that has more tokens nevertheless gets the mean of the vectors of its windows.
Words are cut to their first five characters, as in compression, and counted; those of the speaker are among them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from app.memory.compression.relevance import stems
from app.memory.compression.texts import Place, sentences, words

#: Most characters of a part; one of a script without blanks counts as much as four others.
PART_SIZE = 900
_UNSPACED_COST = 4
#: Most characters of a word, and most occurrences that are counted.
_WORD_SIZE, _MOST_TIMES = 64, 200
#: Separates what a word of a scope is made of: no word of a text has it.
_BAR = "|"
_WIDE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class SourceKind(StrEnum):
    """What a passage is a part of."""

    MESSAGE = "message"
    MEMORY = "memory"
    BLOCK = "block"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class NewPassage:
    """A text that is to be recalled. `source` and `source_id` name it: writing it again replaces it."""

    namespace: str
    source: SourceKind
    source_id: str
    text: str
    #: To whom it belongs; None for the namespace alone.
    user: str | None = None
    #: The id of its conversation, and its place in it: passages beside it are its neighbours.
    conversation: str | None = None
    position: int = 0
    role: str | None = None
    speaker: str | None = None
    #: Of a memory: fact, preference and so on.
    kind: str | None = None
    #: When it was said; None for now.
    at: datetime | None = None


def parts_of(text: str) -> list[str]:
    """Return the parts of a text in order, without the blanks around them; none for a text of blanks."""
    found: list[str] = []
    part, size = "", 0
    for place in _pieces(text):
        piece = text[place.start : place.end]
        cost = _cost(piece)
        if part and size + cost > PART_SIZE:
            found.append(part)
            part, size = "", 0
        part, size = part + piece, size + cost
    return [stripped for one in [*found, part] if (stripped := one.strip())]


def embedded_text(text: str, speaker: str | None) -> str:
    """Return what the vector of a passage is made of: the speaker helps to find who said something."""
    return f"{speaker}: {text}" if speaker else text


def terms_of(text: str) -> list[str]:
    """Return the words of a text as they are stored and searched."""
    return [stem[:_WORD_SIZE] for stem in stems(words(text))]


def scope_word(namespace: str, *, user: str | None = None, conversation: str | None = None) -> str:
    """Return the word that all passages of a namespace have, or of a user (empty: of none), or of a conversation."""
    if conversation is not None:
        return _BAR.join(("c", namespace, conversation))
    return _BAR.join(("n", namespace)) if user is None else _BAR.join(("u", namespace, user))


def lexemes_of(passage: NewPassage, text: str) -> tuple[str, int]:
    """Return the words of a part as a `tsvector`, and how many there are."""
    found = terms_of(embedded_text(text, passage.speaker))
    scopes = [scope_word(passage.namespace), scope_word(passage.namespace, user=passage.user or "")]
    if passage.conversation is not None:
        scopes.append(scope_word(passage.namespace, conversation=passage.conversation))
    entries = [quoted(word) for word in scopes]
    for word, times in Counter(found).items():
        # The number of positions is the number of occurrences; where they are is not needed.
        entries.append(f"{quoted(word)}:{','.join(map(str, range(1, min(times, _MOST_TIMES) + 1)))}")
    return " ".join(entries), len(found)


def quoted(word: str) -> str:
    """Return a word as it is written in a `tsvector` or a `tsquery`."""
    doubled = word.replace("\\", "\\\\").replace("'", "''")
    return f"'{doubled}'"


def _pieces(text: str) -> Iterator[Place]:
    """Yield the sentences of a text, those that are too long in pieces."""
    for sentence in sentences(text):
        start = sentence.start
        while start < sentence.end:
            end = start + _fitting(text, start, sentence.end)
            yield Place(start, end)
            start = end


def _fitting(text: str, start: int, end: int) -> int:
    """Return how many characters fit a part, up to a blank if there is one in the second half."""
    if _cost(text[start : min(end, start + PART_SIZE + 1)]) <= PART_SIZE and end - start <= PART_SIZE:
        return end - start
    size = 0
    for at in range(start, end):
        size += _UNSPACED_COST if _WIDE.match(text[at]) else 1
        if size > PART_SIZE:
            blank = max(text.rfind(" ", start, at), text.rfind("\n", start, at))
            return (blank + 1 if blank - start > (at - start) // 2 else at) - start
    return end - start


def _cost(piece: str) -> int:
    return len(piece) + (_UNSPACED_COST - 1) * len(_WIDE.findall(piece))
