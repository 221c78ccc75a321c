"""
Rolling summaries of what a compression leaves out, written by a model and checked here.

The left-out sentences are split into parts that fit into the model's context; each part is summarised together with
the summary so far. What the model writes is not believed: a sentence of the summary with a number, an id, a name, a
URL or an e-mail address that the source does not have is removed. Ids, URLs and e-mail addresses that it left out are
added verbatim, as far as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.memory.compression import protection, texts
from app.memory.compression.conversation import Sentence, Turn
from app.memory.compression.protection import SpanKind
from app.memory.compression.stop_words import STOP_WORDS

#: Most parts, and with them most requests to the model.
MAX_PARTS = 16
#: Tokens of the instruction and of the template.
INSTRUCTION = 200
_CHECKED = frozenset({SpanKind.NUMBER, SpanKind.ID, SpanKind.NAME, SpanKind.URL, SpanKind.EMAIL})
_VERBATIM = frozenset({SpanKind.ID, SpanKind.URL, SpanKind.EMAIL})
OPENING = "Summary of what was left out: "
_IDENTIFIERS = "Identifiers: "


@dataclass(frozen=True, slots=True)
class CheckedSummary:
    """A summary that says nothing that its source does not have."""

    text: str
    #: Its sentences that were removed, for what the source does not have.
    removed: Sequence[str]
    #: Identifiers that the model left out: added, and without room.
    added: int
    missing: int


def parts(left_out: Sequence[Sentence], turns: Sequence[Turn], characters: int) -> list[str]:
    """Return the left-out sentences in parts of at most so many characters, each with its speakers."""
    found: list[str] = []
    current, turn = "", -1
    for sentence in left_out:
        who = turns[sentence.turn].speaker or turns[sentence.turn].role
        begin = f"\n{who}: " if who and sentence.turn != turn else ""
        if current and len(current) + len(begin) + len(sentence.text) > characters:
            found.append(current.strip())
            current, begin = "", f"{who}: " if who else ""
        current += (begin + sentence.text)[:characters]
        turn = sentence.turn
    return [*found, current.strip()] if current.strip() else found


def prompt(part: str, earlier: str, words: int) -> str:
    """Return the instruction for one part. `earlier` is the summary so far; empty for the first part."""
    before = f"The summary so far:\n{earlier}\n\n" if earlier else ""
    return (
        f"{before}Summarise the following part of a conversation in at most {words} words. Keep names, numbers, dates, "
        f"decisions and identifiers exactly as they are written. Write plain sentences, nothing else.\n\n{part}"
    )


def checked(text: str, left_out: Sequence[Sentence], count: Callable[[str], int], most: int) -> CheckedSummary:
    """Return what may be used of a summary, with at most so many tokens."""
    source = "\n".join(sentence.text for sentence in left_out)
    known = source.casefold()
    plain = frozenset().union(*STOP_WORDS.values())
    good: list[str] = []
    removed: list[str] = []
    for place in texts.sentences(text.strip()):
        sentence = text.strip()[place.start : place.end]
        foreign = [
            span
            for span in protection.spans(sentence, lower=protection.lower_words([source]), plain=plain)
            if span.kind in _CHECKED and not _occurs(sentence[span.start : span.end], known, span.kind)
        ]
        (removed if foreign else good).append(sentence.strip())
    kept = [one for one in good if one]
    while kept and count(OPENING + " ".join(kept)) > most:
        kept.pop()
    written = " ".join(kept)
    wanted = dict.fromkeys(
        sentence.text[span.start : span.end]
        for sentence in left_out
        for span in sentence.spans
        if span.kind in _VERBATIM and sentence.text[span.start : span.end] not in written
    )
    added: list[str] = []
    for identifier in wanted:
        more = [*added, identifier]
        if count(f"{OPENING}{written} {_IDENTIFIERS}{', '.join(more)}.") > most or len(added) >= 100:
            break
        added = more
    if added:
        written = f"{written} {_IDENTIFIERS}{', '.join(added)}.".strip()
    return CheckedSummary(OPENING + written if written else "", removed, len(added), len(wanted) - len(added))


def _occurs(text: str, known: str, kind: SpanKind) -> bool:
    if kind is SpanKind.NAME:  # a name may be put together of known parts
        return all(word in known for word in texts.words(text))
    return text.casefold() in known
