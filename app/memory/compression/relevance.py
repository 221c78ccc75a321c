"""
How relevant each sentence is to a query, and how much it says without one.

Lexical relevance is BM25 (k1 1.5, b .75) over sentences and over turns, on words that are cut to their first five
characters ("F5" stems, which suit many languages). Names and ids of the best sentences join the query with a small
weight, so that the second of two facts that answer a question together is found. Dense scores, where there are some,
are added after both were brought to 0…1. Neighbouring turns lend a part of their score: an answer stands beside its
question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.memory.compression.conversation import Sentence, SplitConversation
from app.memory.compression.protection import SpanKind
from app.memory.compression.stop_words import STOP_WORDS
from app.memory.compression.texts import words

_K1, _B = 1.5, 0.75
_STEM = 5
#: Weight of the turn of a sentence, of the neighbouring turns, and of names that join the query.
_TURN, _NEIGHBOUR, _BRIDGE = 0.5, 0.35, 0.3
#: Sentences whose names join the query.
_BRIDGES = 5
#: Most passages that are embedded, and characters of one where there are few.
MAX_PASSAGES, _PASSAGE = 512, 800
_TELLING = frozenset(
    {SpanKind.NAME, SpanKind.ID, SpanKind.NUMBER, SpanKind.QUOTE, SpanKind.EMAIL, SpanKind.URL, SpanKind.CODE}
)


@dataclass(frozen=True, slots=True)
class Passage:
    """Neighbouring sentences that get one vector."""

    text: str
    #: The numbers of its first sentence, and of the one after its last.
    first: int
    end: int


def passages(conversation: SplitConversation) -> list[Passage]:
    """Return the passages of a conversation, at most MAX_PASSAGES, with the speaker before each."""
    sentences, turns = conversation.sentences, conversation.turns
    most = max(_PASSAGE, math.ceil(sum(len(one.text) for one in sentences) / (MAX_PASSAGES // 2)))
    merged = len(turns) > MAX_PASSAGES // 2
    found: list[Passage] = []
    first = size = 0
    for number in range(len(sentences) + 1):
        ends = number == len(sentences)
        new_turn = not ends and number > first and sentences[number].turn != sentences[number - 1].turn and not merged
        if number > first and (ends or new_turn or size + len(sentences[number].text) > most):
            turn = turns[sentences[first].turn]
            who = turn.speaker or turn.role
            text = "".join(one.text for one in sentences[first:number]).strip()
            if text:
                found.append(Passage(f"{who}: {text}" if who else text, first, number))
            first, size = number, 0
        if not ends:
            size += len(sentences[number].text)
    return found


def stems(found: Iterable[str]) -> list[str]:
    """Return words cut to their stems; numbers and ids stay whole."""
    return [word if any(c.isdigit() for c in word) else word[:_STEM] for word in found]


def document_frequencies(sentences: Sequence[Sentence]) -> Counter[str]:
    """Return in how many sentences each word occurs."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(set(sentence.words))
    return counts


def relevance(conversation: SplitConversation, query: str, dense: Sequence[float] | None = None) -> list[float]:
    """Return the relevance of each sentence, from 0; `dense` has the similarity of each of the `passages`."""
    sentences, turns = conversation.sentences, conversation.turns
    stop = STOP_WORDS.get(conversation.language or "", frozenset()) | STOP_WORDS["en"]
    query_words = words(query)
    wanted = dict.fromkeys(stems(word for word in query_words if word not in stop) or stems(query_words), 1.0)
    speakers = [stems(words(turn.speaker)) for turn in turns]
    documents = [[*speakers[one.turn], *stems(one.words)] for one in sentences]
    by_turn: list[list[str]] = [[*speaker] for speaker in speakers]
    for sentence, document in zip(sentences, documents, strict=True):
        by_turn[sentence.turn] += document[len(speakers[sentence.turn]) :]
    small, large = _Bm25(documents), _Bm25(by_turn)

    def combined(weights: Mapping[str, float]) -> list[float]:
        of_turns = _scaled(large.scores(weights))
        own = _scaled(small.scores(weights))
        return [score + _TURN * of_turns[one.turn] for score, one in zip(own, sentences, strict=True)]

    scores = combined(wanted)
    if dense is not None:
        scores = [a + b for a, b in zip(scores, _spread(dense, passages(conversation), len(sentences)), strict=True)]
    best = sorted(range(len(sentences)), key=lambda i: -scores[i])[:_BRIDGES]
    bridges = dict.fromkeys(
        stem
        for i in best
        if scores[i] > 0
        for span in sentences[i].spans
        if span.kind in (SpanKind.NAME, SpanKind.ID)
        for stem in stems(words(sentences[i].text[span.start : span.end]))
        if stem not in wanted
    )
    if bridges:
        scores = [a + _BRIDGE * b for a, b in zip(scores, combined(dict.fromkeys(bridges, 1.0)), strict=True)]
    return _with_neighbours(scores, sentences, len(turns))


def information(conversation: SplitConversation, weights: Mapping[str, float]) -> list[float]:
    """Return how much each sentence says, by the weights of its words and its protected spans; later ones say more."""
    count = max(1, len(conversation.sentences))
    found = []
    for number, sentence in enumerate(conversation.sentences):
        known = sum(weights.get(word, 0.0) for word in sentence.words)
        telling = sum(span.kind in _TELLING for span in sentence.spans)
        found.append((known + 3 * telling) / (len(sentence.words) + 3) * (0.9 + 0.1 * number / count))
    return found


def _with_neighbours(scores: Sequence[float], sentences: Sequence[Sentence], turns: int) -> list[float]:
    best = [0.0] * (turns + 2)
    for sentence, score in zip(sentences, scores, strict=True):
        best[sentence.turn + 1] = max(best[sentence.turn + 1], score)
    around = (max(best[one.turn], best[one.turn + 2]) for one in sentences)
    return [score + _NEIGHBOUR * other for score, other in zip(scores, around, strict=True)]


def _spread(dense: Sequence[float], of: Sequence[Passage], count: int) -> list[float]:
    """Return the score of its passage for each sentence, from 0 to 1."""
    low = min(dense, default=0.0)
    scaled = _scaled([score - low for score in dense])
    found = [0.0] * count
    for score, passage in zip(scaled, of, strict=True):
        for number in range(passage.first, passage.end):
            found[number] = score
    return found


def _scaled(scores: Sequence[float]) -> list[float]:
    top = max(scores, default=0.0)
    return [score / top for score in scores] if top > 0 else [0.0] * len(scores)


class _Bm25:
    """An index of the words of documents."""

    def __init__(self, documents: Sequence[Sequence[str]]) -> None:
        self._counts = [len(document) for document in documents]
        self._mean = sum(self._counts) / max(1, len(documents)) or 1.0
        self._postings: dict[str, dict[int, int]] = {}
        for number, document in enumerate(documents):
            for word in document:
                of_word = self._postings.setdefault(word, {})
                of_word[number] = of_word.get(number, 0) + 1

    def scores(self, weights: Mapping[str, float]) -> list[float]:
        """Return the score of each document for weighted words."""
        count = len(self._counts)
        found = [0.0] * count
        for word, weight in weights.items():
            postings = self._postings.get(word, {})
            idf = math.log(1 + (count - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, times in postings.items():
                length = 1 - _B + _B * self._counts[number] / self._mean
                found[number] += weight * idf * times * (_K1 + 1) / (times + _K1 * length)
        return found
