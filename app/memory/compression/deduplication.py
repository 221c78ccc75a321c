"""
Sentences that say the same as another one of the same speaker; the last of them stays.

Exact: the same words. Near: the same protected spans in the same order, and at least `LEAST_SIMILARITY` of the pairs of
neighbouring words in common: a sentence with another number, name or negation is never a duplicate.
Sentences of few words answer what was asked before them, and stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from app.memory.compression.conversation import Sentence, Turn

#: Least Jaccard similarity of the pairs of words.
LEAST_SIMILARITY = 0.8
#: Least words of a sentence that can be a duplicate.
LEAST_WORDS = 5
#: Sentences with the same spans that a sentence is compared with: the last ones.
_COMPARED = 16

EXACT, NEAR = "duplicate", "near_duplicate"


def drop_duplicates(sentences: Sequence[Sentence], turns: Sequence[Turn]) -> None:
    """Drop the sentences that a later one repeats."""
    exact: dict[tuple[object, ...], int] = {}
    near: dict[tuple[object, ...], list[tuple[int, frozenset[tuple[str, str]]]]] = defaultdict(list)
    for number in range(len(sentences) - 1, -1, -1):
        sentence = sentences[number]
        if len(sentence.words) < LEAST_WORDS or sentence.bundle is not None:
            continue
        turn = turns[sentence.turn]
        spans = tuple(sentence.text[span.start : span.end] for span in sentence.spans)
        who = (turn.role, turn.speaker, spans)
        same = exact.setdefault((*who, *sentence.words), number)
        if same != number:
            other = sentences[same].same_as
            _drop(sentence, EXACT, same if other is None else other)
            continue
        pairs = frozenset(zip(sentence.words, sentence.words[1:], strict=False))
        for other, others in near[who]:
            common = len(pairs & others)
            if common >= LEAST_SIMILARITY * (len(pairs) + len(others) - common):
                _drop(sentence, NEAR, other)
                break
        else:
            kept = near[who]
            kept.append((number, pairs))
            if len(kept) > _COMPARED:
                del kept[0]


def _drop(sentence: Sentence, reason: str, same_as: int) -> None:
    if not sentence.pinned:
        sentence.dropped, sentence.same_as = reason, same_as
