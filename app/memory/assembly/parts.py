"""
The parts of a prompt, their budgets in tokens, and what was left out.

The room is what a model's context leaves beside the answer. Parts that change from turn to turn have a reserved budget,
used or not: otherwise the recent messages, which fill the rest, would begin at another place in each turn, and
nothing of the prompt that the engine has computed could be used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class PromptPart(StrEnum):
    """A part of a prompt, in the order in which they stand there; personal context and recalled texts stand last."""

    #: The system messages of the conversation and of the request.
    SYSTEM = "system"
    BLOCKS = "blocks"
    SUMMARY = "summary"
    #: The last messages of the conversation.
    RECENT = "recent"
    #: Chosen for the last message, and put in front of it.
    PERSONAL = "personal"
    RECALLED = "recalled"
    #: The messages of the request.
    REQUEST = "request"


#: The default budgets of parts, as shares of the room without system messages.
SHARES: Mapping[PromptPart, float] = {
    PromptPart.BLOCKS: 0.15,
    PromptPart.SUMMARY: 0.15,
    PromptPart.PERSONAL: 0.06,
    PromptPart.RECALLED: 0.10,
}
#: Most of the room that these parts can have together, if the request does not say otherwise.
_MOST_TOGETHER = 0.5


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text that may be part of the prompt."""

    id: str
    text: str
    tokens: int
    #: What is reported of it: its score, its source.
    about: Mapping[str, Any] = field(default_factory=dict)
    #: The place of the message that it repeats, in this conversation.
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class Omission:
    """Something that is not in the prompt."""

    part: PromptPart
    reason: str
    #: Of a block, a document, a memory; None for messages.
    id: str | None = None
    #: None when nobody has counted them.
    tokens: int | None = None
    #: The places of the first and the last one, for messages.
    first_seq: int | None = None
    last_seq: int | None = None

    def document(self) -> dict[str, Any]:
        """As JSON, without what it does not have."""
        found = {
            "part": self.part.value,
            "id": self.id,
            "tokens": self.tokens,
            "first_seq": self.first_seq,
            "last_seq": self.last_seq,
            "reason": self.reason,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Budgets:
    """Tokens for each part. `recent` is None for what the others leave."""

    blocks: int
    summary: int
    personal: int
    recalled: int
    recent: int | None = None

    @property
    def reserved(self) -> int:
        """Tokens that the recent messages never use."""
        return self.summary + self.personal + self.recalled


def budgets(room: int, given: Mapping[str, int | None], available: frozenset[PromptPart]) -> Budgets:
    """
    Return the budgets for a room of so many tokens. `given` has those of the request; parts that are not `available`
    have none.

    Together they leave at least half of the room to the messages, or what the request left.
    """
    found: dict[str, int] = {}
    for part, share in SHARES.items():
        own = given.get(part.value)
        found[part.value] = 0 if part not in available else int(room * share) if own is None else own
    most = max(int(room * _MOST_TOGETHER), 0)
    together = sum(found.values())
    if together > most:
        found = {name: value * most // together for name, value in found.items()}
    return Budgets(**found, recent=given.get(PromptPart.RECENT.value))


def chosen(
    part: PromptPart, candidates: tuple[Candidate, ...], budget: int, *, window_from: int | None = None
) -> tuple[tuple[Candidate, ...], list[Omission]]:
    """
    Return the candidates that fit a budget, in their order, and those that do not.

    A longer one that does not fit leaves its place to shorter ones after it. What the window from the place
    `window_from` on has itself is not repeated.
    """
    kept: list[Candidate] = []
    omitted: list[Omission] = []
    left = budget
    for one in candidates:
        if one.seq is not None and window_from is not None and one.seq >= window_from:
            omitted.append(Omission(part, "it is one of the recent messages", one.id, one.tokens))
        elif one.tokens > left:
            reason = f"{one.tokens} tokens, and {left} of the budget of {budget} are left"
            omitted.append(Omission(part, reason, one.id, one.tokens))
        else:
            kept.append(one)
            left -= one.tokens
    return tuple(kept), omitted
