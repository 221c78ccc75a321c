"""
Pruning: sentences without the words that say least.

A word weighs 0 if it is a stop word of the conversation's language, else by the inverse of its frequency among the
sentences. Words of a protected span have no weight here: they always stay, with what stands between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.memory.compression.conversation import Sentence, SplitConversation
from app.memory.compression.stop_words import STOP_WORDS
from app.memory.compression.texts import words

_PART = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Part:
    """A word of a sentence with the marks on it, as blanks separate them."""

    start: int
    end: int
    #: None for a word that stays.
    weight: float | None
    #: Whether it continues the protected span of the part before.
    continues: bool
    #: Its tokens, with a blank before it.
    tokens: int


def word_weights(conversation: SplitConversation, frequencies: Mapping[str, int]) -> dict[str, float]:
    """Return the weight of each word."""
    stop = STOP_WORDS.get(conversation.language or "", frozenset())
    count = len(conversation.sentences)
    return {word: 0.0 if word in stop else math.log(1 + count / frequency) for word, frequency in frequencies.items()}


def part_texts(conversation: SplitConversation) -> list[str]:
    """Return the different parts of all sentences, whose tokens are to be counted."""
    return list(dict.fromkeys(part for one in conversation.sentences for part in _PART.findall(one.text)))


def part_weights(part_texts: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of each different part: that of its heaviest word."""
    return {part: max((weights.get(word, 0.0) for word in words(part)), default=0.0) for part in part_texts}


def parts(sentence: Sentence, weights: Mapping[str, float], tokens: Mapping[str, int]) -> list[Part]:
    """Return the parts of a sentence. `weights` and `tokens` are those of parts."""
    found: list[Part] = []
    spans, at = sentence.spans, 0
    for match in _PART.finditer(sentence.text):
        start, end = match.span()
        while at < len(spans) and spans[at].end <= start:
            at += 1
        is_protected = at < len(spans) and spans[at].start < end
        continues = is_protected and spans[at].start < start
        weight = None if is_protected else weights[match[0]]
        found.append(Part(start, end, weight, continues, tokens[match[0]]))
    return found


def pruned(sentence: Sentence, of: Sequence[Part], least: float) -> str:
    """Return a sentence without the words that weigh `least` or less; empty if nothing is left."""
    left: list[str] = []
    last_end = 0
    for part in of:
        if part.weight is None or part.weight > least:
            if left:
                left.append(sentence.text[last_end : part.start] if part.continues else " ")
            left.append(sentence.text[part.start : part.end])
        last_end = part.end
    if not left:
        return ""
    blanks = sentence.text[of[-1].end :]
    return "".join(left) + ("\n" if "\n" in blanks else " " if blanks else "")
