"""
Words and sentences of texts in any language, with their places.

A word is a maximal run of letters, marks and digits; in scripts without spaces (Chinese, Japanese, Thai and others)
each pair of neighbouring characters is a word, as in Lucene's CJK analyzer. A sentence ends at its mark and the
blanks after it, or at the end of a line. No sentence ends within a protected place. Sentences have at most
`MAX_SENTENCE` characters, except where a protected place is longer.

All of it takes time linear in the length of the text.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Most characters of a sentence; a longer one is split at a blank.
MAX_SENTENCE = 1_000

#: Scripts that are written without blanks between words: Thai to Khmer, kana, Han, Hangul is not one of them.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]+|[^\W_{_UNSPACED}](?:[^\W_{_UNSPACED}]|['’](?=[^\W_]))*")
_IS_UNSPACED = re.compile(rf"[{_UNSPACED}]")
#: A possible end of a sentence: its marks with closing quotes and brackets, then blanks; or the end of a line.
_END = re.compile(r"[.!?…؟।۔]{1,8}[\"'”’»)\]]{0,4}\s+|[。！？]{1,8}[」』”’）]{0,4}\s*|\n\s*")
_BLANK = re.compile(r"\s")
#: Words before a full stop that ends no sentence.
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Za-zÀ-Þ]|Mr|Mrs|Ms|Dr|Prof|St|No|Nr|vs|e\.g|i\.e|z\.B|d\.h|u\.a|bzw|ca|approx|Inc|Ltd|Co|"
    r"Sr|Sra|M|Mme|etc|Fig|Eq|p|pp|vol)\.$"
)


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a text: its characters from `start` up to `end`."""

    start: int
    end: int


def words(text: str) -> list[str]:
    """Return the words of a text without regard to case, in order."""
    found: list[str] = []
    for match in _WORD.finditer(text):
        word = match[0].casefold()
        if _IS_UNSPACED.match(word) and len(word) > 1:
            found += (word[i : i + 2] for i in range(len(word) - 1))
        else:
            found.append(word)
    return found


def sentences(text: str, protected: Sequence[Place] = ()) -> list[Place]:
    """Return the sentences of a text, which together are the whole text: each has the blanks that follow it."""
    starts, ends = [place.start for place in protected], [place.end for place in protected]

    def is_within(position: int) -> bool:
        at = bisect.bisect_left(starts, position) - 1
        return at >= 0 and ends[at] > position

    found: list[Place] = []
    begin = 0
    for end in _possible_ends(text):
        if is_within(end):
            continue
        found += _pieces(text, begin, end, protected, starts)
        begin = end
    if begin < len(text):
        found += _pieces(text, begin, len(text), protected, starts)
    return found


def _possible_ends(text: str) -> Iterator[int]:
    """Yield the positions after the end marks and the blanks that follow them."""
    for match in _END.finditer(text):
        end, mark = match.end(), match[0]
        if "\n" not in mark and end < len(text):
            before = text[max(0, match.start() - 12) : match.start() + 1]
            if text[end].islower() or (mark[0] == "." and _ABBREVIATION.search(before)):
                continue
        yield end


def _pieces(text: str, start: int, end: int, protected: Sequence[Place], starts: Sequence[int]) -> Iterator[Place]:
    """Yield a sentence, or its pieces if it is too long. No piece ends within a protected place."""
    while end - start > MAX_SENTENCE:
        cut = start + MAX_SENTENCE
        low = start + MAX_SENTENCE // 2
        at = next((i + 1 for i in range(cut - 1, low, -1) if _BLANK.match(text, i)), cut)
        place = bisect.bisect_left(starts, at) - 1
        if place >= 0 and protected[place].end > at:
            at = protected[place].start if protected[place].start > start else protected[place].end
        if at >= end:
            break
        yield Place(start, at)
        start = at
    yield Place(start, end)
