"""
Grounding: whether what an output says occurs in its sources.

Values, numbers, names and quotes must occur in a source as they are, apart from case, blanks and the form of a number
(`1,200.00` is 1200; `three` is 3). A sentence is supported if one part of a source has enough of its words, and all of
its numbers. That is a comparison of words: it finds what was invented, not what was combined wrongly.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from app.memory.compression import protection, texts
from app.memory.compression.protection import SpanKind
from app.memory.compression.stop_words import STOP_WORDS
from app.workflows.language.verification import GroundedPart
from workers.refinement import outputs

#: Most characters of all sources together, and of an output.
MAX_SOURCES, MAX_OUTPUT = 2_000_000, 100_000
#: Most checks of one output, and most sentences of sources that a sentence is compared with.
MAX_CHECKS, _MAX_SENTENCES = 200, 5_000

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,'\u2019 \u00a0]{0,30}(?:\.\d{1,20})?(?![\d])|(?<![\w.])[-+]?\.\d{1,20}")
_SEPARATORS = re.compile(r"[,'\u2019\s\u00a0]")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:[,'\u2019 \u00a0]\d{3})+(?:\.\d+)?")
_BLANKS = re.compile(r"\s+")
_SPELLED = {
    word: float(number)
    for number, word in [
        *enumerate(
            [
                "zero",
                "one",
                "two",
                "three",
                "four",
                "five",
                "six",
                "seven",
                "eight",
                "nine",
                "ten",
                "eleven",
                "twelve",
                "thirteen",
                "fourteen",
                "fifteen",
                "sixteen",
                "seventeen",
                "eighteen",
                "nineteen",
                "twenty",
            ]
        ),
        *(
            (10 * tens, word)
            for tens, word in enumerate(["thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 3)
        ),
        (12, "dozen"),
    ]
}
_PLAIN = frozenset().union(*STOP_WORDS.values())


@dataclass(frozen=True, slots=True)
class GroundedItem:
    """Something that an output says, and whether the sources have it."""

    name: str
    found: bool
    message: str


@dataclass(frozen=True)
class GroundingSources:
    """The texts that an output must stay with."""

    texts: Sequence[str]

    @cached_property
    def folded(self) -> str:
        """All texts, without differences of case and blanks."""
        return "\n".join(_folded(text) for text in self.texts)

    @cached_property
    def numbers(self) -> frozenset[float]:
        """All numbers, spelled ones included."""
        found = {number for text in self.texts for number in _numbers(text)}
        words = set(re.findall(r"[a-z]+", self.folded))
        return frozenset(found | {number for word, number in _SPELLED.items() if word in words})

    @cached_property
    def sentences(self) -> Sequence[tuple[frozenset[str], frozenset[float]]]:
        """The words and numbers of each sentence, and of each with the next."""
        found = [
            (_words(text[place.start : place.end]), frozenset(_numbers(text[place.start : place.end])))
            for text in self.texts
            for place in texts.sentences(text)
        ][:_MAX_SENTENCES]
        pairs = [(a | c, b | d) for (a, b), (c, d) in itertools.pairwise(found)]
        return [*found, *pairs]

    def has(self, text: str) -> bool:
        """Whether a text occurs, as whole words."""
        wanted = _folded(text).strip(" .,;:!?")
        if not wanted:
            return True
        at = self.folded.find(wanted)
        while at >= 0:
            before, after = self.folded[at - 1 : at], self.folded[at + len(wanted) : at + len(wanted) + 1]
            if not (before.isalnum() and wanted[0].isalnum()) and not (after.isalnum() and wanted[-1].isalnum()):
                return True
            at = self.folded.find(wanted, at + 1)
        return False


def grounded(
    value: Any,
    sources: GroundingSources,
    what: Sequence[GroundedPart] | None = None,
    *,
    fields: Sequence[str] = (),
    ignore: Sequence[str] = (),
    support: float = 0.6,
) -> list[GroundedItem]:
    """Return what the output says of each kind, and whether it is grounded; at most MAX_CHECKS items."""
    default: tuple[GroundedPart, ...] = ("numbers", "names", "quotes") if isinstance(value, str) else ("values",)
    parts: Sequence[GroundedPart] = what or default
    text = outputs.written(value)[:MAX_OUTPUT]
    found: list[GroundedItem] = []
    if "values" in parts:
        found += _values(value, sources, fields, ignore)
    if {"numbers", "names", "quotes"} & set(parts):
        found += _spans(text, sources, parts)
    if "sentences" in parts:
        found += _sentences(text, sources, support)
    return found[:MAX_CHECKS]


def _values(
    value: Any, sources: GroundingSources, fields: Sequence[str], ignore: Sequence[str]
) -> Iterator[GroundedItem]:
    for path, leaf in outputs.leaves(value):
        if isinstance(leaf, bool) or leaf is None or (isinstance(leaf, str) and not leaf.strip()):
            continue
        if (fields and not _under(path, fields)) or _under(path, ignore):
            continue
        found = float(leaf) in sources.numbers if isinstance(leaf, int | float) else _has_text(leaf, sources)
        shown = outputs.written(leaf)[:80]
        yield GroundedItem(path or "value", found, f"{path or 'the value'}: {shown!r} does not occur in the source")


def _has_text(text: str, sources: GroundingSources) -> bool:
    number = outputs.normal(text)
    return sources.has(text) or (number[0] == "number" and number[1] in sources.numbers)


def _spans(text: str, sources: GroundingSources, what: Sequence[GroundedPart]) -> Iterator[GroundedItem]:
    wanted = {
        **({SpanKind.NUMBER: "number", SpanKind.ID: "id"} if "numbers" in what else {}),
        **({SpanKind.NAME: "name", SpanKind.EMAIL: "address", SpanKind.URL: "address"} if "names" in what else {}),
        **({SpanKind.QUOTE: "quote"} if "quotes" in what else {}),
    }
    lower = protection.lower_words([*sources.texts, text])
    seen: set[str] = set()
    for span in protection.spans(text, lower=lower, plain=_PLAIN):
        said = text[span.start : span.end]
        if span.kind not in wanted or said in seen:
            continue
        seen.add(said)
        match span.kind:
            case SpanKind.NUMBER:
                numbers = list(_numbers(said))
                found = sources.has(said) or (bool(numbers) and all(one in sources.numbers for one in numbers))
            case SpanKind.NAME:
                found = all(sources.has(word) for word in texts.words(said))
            case SpanKind.QUOTE:
                found = sources.has(said[1:-1])
            case _:
                found = sources.has(said)
        kind = wanted[span.kind]
        yield GroundedItem(f"{kind} {said[:60]}", found, f"the {kind} {said[:80]!r} does not occur in the source")


def _sentences(text: str, sources: GroundingSources, support: float) -> Iterator[GroundedItem]:
    for number, place in enumerate(texts.sentences(text)):
        sentence = text[place.start : place.end].strip()
        words, numbers = _words(sentence), frozenset(_numbers(sentence))
        if not words and not numbers:
            continue
        best = max(
            (len(words & of) / max(1, len(words)) for of, known in sources.sentences if numbers <= known), default=0.0
        )
        message = f"the sentence {sentence[:100]!r} is not supported by the source"
        yield GroundedItem(f"sentence {number + 1}", best >= support, message)


def _under(path: str, of: Sequence[str]) -> bool:
    """Whether a path is one of these fields, or inside of one; positions in lists do not count."""
    plain = ".".join(part for part in path.split(".") if not part.isdecimal())
    return any(one in (path, plain) or path.startswith(f"{one}.") or plain.startswith(f"{one}.") for one in of)


def _folded(text: str) -> str:
    return _BLANKS.sub(" ", text).casefold()


def _words(text: str) -> frozenset[str]:
    return frozenset(word for word in texts.words(text) if word not in _PLAIN and not word.isdecimal())


def _numbers(text: str) -> Iterator[float]:
    for match in _NUMBER.finditer(text):
        said = match[0].strip(" ,'\u2019\u00a0")
        parts = [said] if _GROUPED.fullmatch(said) else re.split(r"[,'\u2019 \u00a0]+", said)
        for part in parts:
            number = outputs.normal(_SEPARATORS.sub("", part))
            if number[0] == "number":
                yield number[1]
