"""
A conversation as compression sees it: turns, their sentences, and the protected spans of each.

A text is a conversation of one turn. Bundles are sentences that stay or go together, such as the result of a tool with
the call that it answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.memory.compression import protection, structure, texts
from app.memory.compression.protection import Span, SpanKind
from app.memory.compression.stop_words import STOP_WORDS, language_of

#: Most sentences of a conversation.
MAX_SENTENCES = 60_000
#: Kinds of spans that stripping leaves as they are.
_VERBATIM = (SpanKind.CODE, SpanKind.QUOTE, SpanKind.GIVEN, SpanKind.URL)


class TooManySentences(ValueError):
    """The conversation has more sentences than compression takes."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker said at once."""

    content: str
    role: str = ""
    speaker: str = ""
    at: str = ""
    #: The other fields of the message, which are returned as they were.
    fields: Mapping[str, Any] = field(default_factory=dict)
    #: The turns of a bundle have the same number.
    bundle: int | None = None
    #: The turn stays as it is.
    pinned: bool = False


@dataclass(slots=True)
class Sentence:
    """A sentence of a turn, with what has been decided about it."""

    turn: int
    text: str
    words: list[str]
    #: Protected spans; their places are those in the text of the sentence.
    spans: list[Span]
    pinned: bool = False
    bundle: int | None = None
    #: Why it was dropped, and the number of the sentence that says the same.
    dropped: str = ""
    same_as: int | None = None
    #: The shorter form that replaces it.
    pruned: str | None = None

    @property
    def kept_text(self) -> str:
        """What is left of it."""
        return "" if self.dropped else self.text if self.pruned is None else self.pruned


@dataclass(frozen=True, slots=True)
class Protection:
    """What a user protects."""

    patterns: Sequence[str] = ()
    texts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SplitConversation:
    """Turns and their sentences."""

    turns: Sequence[Turn]
    sentences: list[Sentence]
    language: str | None

    def contents(self) -> list[str]:
        """Return what is left of each turn; empty for a turn that was dropped."""
        parts: list[list[str]] = [[] for _ in self.turns]
        has_gap = False
        for sentence in self.sentences:
            text = sentence.kept_text
            before = parts[sentence.turn]
            if text and before and has_gap and not before[-1][-1].isspace():
                before.append(" ")
            if text:
                before.append(text)
            has_gap = not text
        joined = map("".join, parts)
        return [text if turn.pinned else text.strip() for turn, text in zip(self.turns, joined, strict=True)]


def of_turns(turns: Sequence[Turn], given: Protection, *, strip: bool) -> SplitConversation:
    """
    Split turns into sentences. With `strip`, structure that carries no words is removed first.

    Raises TooManySentences, protection.TooManyMatches, regex.PatternRefused.
    """
    lower = protection.lower_words([turn.content for turn in turns])
    plain = frozenset().union(*STOP_WORDS.values())

    def spans_of(text: str) -> list[Span]:
        return protection.spans(text, patterns=given.patterns, given=given.texts, lower=lower, plain=plain)

    sentences: list[Sentence] = []
    for number, turn in enumerate(turns):
        content = turn.content
        spans = spans_of(content)
        if strip and not turn.pinned:
            shorter = structure.stripped(content, [span for span in spans if span.kind in _VERBATIM])
            if shorter != content:
                content, spans = shorter, spans_of(shorter)
        next_span = 0
        places = texts.sentences(content, spans) if content else []
        if len(sentences) + len(places) > MAX_SENTENCES:
            raise TooManySentences(f"it has more than {MAX_SENTENCES} sentences")
        for place in places:
            own: list[Span] = []
            while next_span < len(spans) and spans[next_span].start < place.end:
                span = spans[next_span]
                own.append(Span(span.start - place.start, span.end - place.start, span.kind))
                next_span += 1
            text = content[place.start : place.end]
            pinned = turn.pinned or any(span.kind is SpanKind.GIVEN for span in own)
            sentences.append(Sentence(number, text, texts.words(text), own, pinned, turn.bundle))
    for bundle in {one.bundle for one in sentences if one.pinned and one.bundle is not None}:
        for sentence in sentences:
            sentence.pinned = sentence.pinned or sentence.bundle == bundle
    language = language_of(word for sentence in sentences for word in sentence.words)
    return SplitConversation(turns, sentences, language)
