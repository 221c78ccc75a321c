"""
Protected spans: parts of a text that compression never cuts within a sentence that it keeps.

They are code, URLs, e-mail addresses, quotes, ids, numbers, names and negations, and whatever a user's patterns and
texts match. What a user protects also keeps its sentence.
The patterns here have no nested repetitions. Those of users run on RE2, line by line, with a limit on their matches.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from app.kernel.security import regex
from app.memory.compression.texts import Place

#: Most matches of one pattern or text of a user.
MAX_MATCHES = 20_000
#: Characters of a line in which a user's pattern is matched at once; a longer line is matched in parts.
_LINE = 2_000


class SpanKind(StrEnum):
    """Why a span is protected."""

    GIVEN = "given"
    CODE = "code"
    URL = "url"
    EMAIL = "email"
    QUOTE = "quote"
    ID = "id"
    NUMBER = "number"
    NEGATION = "negation"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Span(Place):
    """A protected part of a text."""

    kind: SpanKind


class TooManyMatches(ValueError):
    """A pattern or a text of a user matches too often; the message names it."""


#: In the order in which they are looked for; a later kind that overlaps an earlier one is part of that.
_PATTERNS: tuple[tuple[SpanKind, re.Pattern[str]], ...] = (
    (SpanKind.CODE, re.compile(r"```[^`]{0,20000}```|`[^`\n]{1,500}`")),
    (
        SpanKind.URL,
        re.compile(r"\b(?:[a-z][a-z0-9+.-]{1,15}://|www\.)[^\s<>\"'`]{0,2000}[^\s<>\"'`.,;:!?)\]]", re.IGNORECASE),
    ),
    (SpanKind.EMAIL, re.compile(r"[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")),
    (
        SpanKind.QUOTE,
        re.compile(
            r"\"[^\"\n]{1,300}\"|“[^”\n]{1,300}”|„[^“”\n]{1,300}[“”]|«[^»\n]{1,300}»|「[^」\n]{1,300}」|『[^』\n]{1,300}』"
        ),
    ),
    (
        SpanKind.ID,
        re.compile(
            r"[#@]\w{1,100}|(?<!\S)[~.]{0,2}(?:/[\w.-]{1,100}){2,20}"
            r"|(?<![\w-])(?=[\w-]{0,60}\d)(?=[\w-]{0,60}[^\W\d_])\w[\w-]{1,100}"
            r"|\b[^\W\d_]\w{0,60}(?:_\w{1,60}){1,10}|\b[a-z]{1,30}[A-Z]\w{0,60}|\b\w{1,60}(?:\.\w{1,60}){1,10}\(\)?"
        ),
    ),
    (
        SpanKind.NUMBER,
        re.compile(
            r"(?<!\w)[+\-−±]?(?:[$€£¥₹]\s?)?\d[\d.,:/'’_-]{0,60}(?<![.,:/'’_-])(?:\s?(?:%|‰|°[CF]?|[€$£¥₹]))?|(?<=\w)\d+|[½¼¾]"
        ),
    ),
    (
        SpanKind.NEGATION,
        re.compile(
            r"\b(?:not|no|never|none|nobody|nothing|nowhere|neither|nor|without|cannot|except|unless|\w{2,8}n['’]t"
            r"|nicht|nichts|nie|niemals|niemand|kein(?:e[mnrs]?)?|ohne|weder|außer"
            r"|ne|pas|jamais|rien|aucune?|sans|personne|nunca|jamás|nada|nadie|ningun[oa]?|ningún|sin|tampoco"
            r"|non|mai|niente|nessun[oa]?|senza|não|sem|nem|ninguém|niet|geen|nooit|zonder|не|нет|никогда|ничего|без)\b",
            re.IGNORECASE,
        ),
    ),
)
#: A word that begins with an upper-case letter, and those that follow it.
_CAPITAL = r"[^\W\d_a-z]\w{0,60}(?:['’.-]\w{1,60}){0,6}"
_CAPITALS = re.compile(
    rf"\b{_CAPITAL}(?:[ \u00a0](?:(?:de|da|di|del|van|von|der|den|la|le|of|al) ){{0,2}}{_CAPITAL}){{0,6}}"
)
_LOWER = re.compile(r"\b[^\W\d_]\w*")
_SENTENCE_START = re.compile(r"(?:^|[.!?…:;\n•*\-\"“‘(\[>]\s*)$")


def lower_words(texts: Sequence[str]) -> set[str]:
    """Return the words that the texts write in lower case: at the start of a sentence, they are no names."""
    return {word for text in texts for word in _LOWER.findall(text) if word[0].islower()}


def spans(
    text: str,
    *,
    patterns: Sequence[str] = (),
    given: Sequence[str] = (),
    lower: Collection[str] = (),
    plain: Collection[str] = (),
) -> list[Span]:
    """
    Return the protected spans of a text, in order and without overlaps.

    `patterns` and `given` are patterns and texts of the user. `lower` and `plain` are words in lower case that are no
    names when they begin a sentence. Raises regex.PatternRefused, TooManyMatches.
    """
    found: list[Span] = []
    for pattern in patterns:
        found += (Span(start, end, SpanKind.GIVEN) for start, end in _matches(pattern, text))
    for one in given:
        found += _occurrences(one, text)
    for kind, compiled in _PATTERNS:
        found += (Span(m.start(), m.end(), kind) for m in compiled.finditer(text) if m.end() > m.start())
    found += _names(text, lower, plain)
    return _merged(found)


def _names(text: str, lower: Collection[str], plain: Collection[str]) -> Iterator[Span]:
    for match in _CAPITALS.finditer(text):
        start, end = match.span()
        if not match[0][0].isupper():
            continue
        if _SENTENCE_START.search(text[max(0, start - 4) : start]) or start == 0:
            first, blank, _ = match[0].partition(" ")
            if (word := first.casefold()) in lower or word in plain:
                start += len(first) + len(blank)
        elif match[0].casefold() in plain and not (len(match[0]) > 1 and match[0].isupper()):
            continue
        if start < end:
            yield Span(start, end, SpanKind.NAME)


def _occurrences(given: str, text: str) -> Iterator[Span]:
    at, count = text.find(given), 0
    while at >= 0:
        count += 1
        if count > MAX_MATCHES:
            raise TooManyMatches(f"the text {given[:40]!r} occurs more than {MAX_MATCHES} times")
        yield Span(at, at + len(given), SpanKind.GIVEN)
        at = text.find(given, at + len(given))


def _matches(pattern: str, text: str) -> Iterator[tuple[int, int]]:
    compiled = regex.compiled(pattern)
    count = offset = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), _LINE):
            for begin, end in compiled.places_in(line[start : start + _LINE]):
                count += 1
                if count > MAX_MATCHES:
                    raise TooManyMatches(f"the pattern {pattern[:40]!r} matches more than {MAX_MATCHES} times")
                yield offset + start + begin, offset + start + end
        offset += len(line)


def _merged(found: list[Span]) -> list[Span]:
    """Return the spans in order, overlapping ones as one: what a user gave, or else the earlier kind, names it."""
    order = {kind: number for number, kind in enumerate(SpanKind)}
    merged: list[Span] = []
    for span in sorted(found, key=lambda span: (span.start, -span.end)):
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            kind = min(last.kind, span.kind, key=order.__getitem__)
            merged[-1] = Span(last.start, max(last.end, span.end), kind)
        else:
            merged.append(span)
    return merged
