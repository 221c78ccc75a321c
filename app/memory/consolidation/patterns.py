"""
Which patterns are written: how sure each is, and which known pattern says the same.

The confidence of a pattern is how near the statements of both passes are, times the share of its words that several of
its turns have. Numbers and names must stand in its turns. A pattern that somebody has ended is not written again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import mul
from typing import Any

from app.memory.memories import gate
from app.memory.memories.gate import ProposedMemory
from app.memory.memories.kinds import MemoryKind

#: Cosine of the vectors of two patterns, and words in common of all words of both, from which on they say the same.
SAME_COSINE, SAME_WORDS = 0.85, 0.4
#: Cosine of two statements below which they have nothing to do with each other.
UNRELATED_COSINE = 0.2
#: Least share of the words of a pattern that its turns have.
LEAST_GROUNDED = 0.5
#: The highest confidence of a pattern that was found once.
HIGHEST_AT_FIRST = 0.9
#: By how much a pattern that is found again is believed: this part of the new confidence counts as further evidence.
REINFORCEMENT = 0.5


class PatternReason(StrEnum):
    """Why a pattern is not written."""

    #: The model could not answer in the form.
    UNANSWERED = "unanswered"
    #: The model says that the turns have nothing in common.
    NO_PATTERN = "no_pattern"
    #: It is no statement: too short, too long, a question, a placeholder.
    FORM = "form"
    #: Its turns do not have its numbers, names or words.
    NOT_GROUNDED = "not_grounded"
    #: Both passes disagree.
    LOW_CONFIDENCE = "low_confidence"
    #: It says what somebody has ended.
    ENDED = "ended"
    #: Too many of its turns were deleted meanwhile.
    TURNS_DELETED = "turns_deleted"


@dataclass(frozen=True, slots=True)
class JudgedPattern:
    """A pattern, and how sure it is."""

    text: str
    reason: PatternReason | None = None
    confidence: float = 0.0
    #: How near the statements of both passes are, from 0 to 1.
    agreement: float = 0.0
    #: The share of its words that several turns have.
    grounded: float = 0.0


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of two vectors; 0 if one of them is 0."""
    length = math.sqrt(sum(map(mul, one, one)) * sum(map(mul, other, other)))
    return sum(map(mul, one, other)) / length if length else 0.0


def statement_of(answer: Any) -> str | None:
    """Return the pattern of an answer, which has passed its schema; None without one."""
    return None if answer is None or answer["pattern"] is None else answer["pattern"].strip()


def judge(first: Any, second: Any, near: float, turns: Sequence[str], least: float) -> JudgedPattern:
    """
    Judge the answers of both passes about the turns of a cluster.

    `near` is the cosine of the vectors of both statements, `least` the least confidence.
    """
    text = statement_of(first)
    if first is None:
        return JudgedPattern("", PatternReason.UNANSWERED)
    if text is None:
        return JudgedPattern("", PatternReason.NO_PATTERN)
    if gate.refused_by_form(ProposedMemory(text, MemoryKind.PATTERN)) is not None:
        return JudgedPattern(text, PatternReason.FORM)
    grounded = grounding(text, turns)
    agreement = 0.0
    if statement_of(second) is not None:
        agreement = min(max((near - UNRELATED_COSINE) / (1 - UNRELATED_COSINE), 0.0), 1.0)
    confidence = round(HIGHEST_AT_FIRST * math.sqrt(agreement * grounded), 3)
    judged = JudgedPattern(text, None, confidence, round(agreement, 3), round(grounded, 3))
    reason = None
    if grounded < LEAST_GROUNDED or gate.missing_spans(text, turns):
        reason = PatternReason.NOT_GROUNDED
    elif confidence < least:
        reason = PatternReason.LOW_CONFIDENCE
    return JudgedPattern(text, reason, judged.confidence, judged.agreement, judged.grounded)


def grounding(text: str, turns: Sequence[str]) -> float:
    """Return the share of the words of a pattern that at least two of its turns have."""
    wanted = gate.content_words(text)
    found = Counter(word for turn in turns for word in gate.content_words(turn) & wanted)
    return sum(times >= min(2, len(turns)) for times in found.values()) / len(wanted) if wanted else 0.0


def says_the_same(one: str, other: str, near: float | None) -> bool:
    """
    Whether two patterns say the same; `near` is the cosine of their vectors, None when one has none.

    Vectors alone do not tell Monday from Tuesday: numbers, names and negations must be the same.
    """
    if gate.says_the_same(one, other):
        return True
    return (
        near is not None
        and near >= SAME_COSINE
        and gate.similarity(one, other) >= SAME_WORDS
        and gate.is_negative(one) == gate.is_negative(other)
        and not gate.missing_spans(one, [other])
        and not gate.missing_spans(other, [one])
    )


def reinforced(known: float, found: float) -> float:
    """Return the confidence of a known pattern that was found again with another confidence."""
    return round(1 - (1 - known) * (1 - REINFORCEMENT * found), 3)
