"""
The plan of a prompt: what is known, fitted into the room that a model's context leaves.

What must be there comes first: system messages and the messages of the request. Then the other parts get their budgets,
and the recent messages the rest. Whatever does not fit is listed with the reason and its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.memory.assembly import parts
from app.memory.assembly.parts import Budgets, Candidate, Omission, PromptPart
from app.memory.assembly.window import CountedMessage, PromptWindow, fitted

#: Most omissions that are listed one by one.
MAX_LISTED = 50


class PromptTooLong(Exception):
    """The messages of a request, with the system messages, do not fit the context."""

    def __init__(self, tokens: int, room: int) -> None:
        self.tokens, self.room = tokens, room
        super().__init__(f"the messages of the request and the system messages have {tokens} tokens, of {room}")


@dataclass(frozen=True, slots=True)
class Known:
    """What may go into a prompt, counted."""

    #: Tokens of the system messages, and of the messages of the request.
    system_tokens: int
    request_tokens: int
    blocks: tuple[Candidate, ...] = ()
    personal: tuple[Candidate, ...] = ()
    recalled: tuple[Candidate, ...] = ()
    #: Summaries by the last place that they cover; their `seq` is that place.
    summaries: tuple[Candidate, ...] = ()
    history: Sequence[CountedMessage] = ()
    #: Whether the conversation has messages before those of `history`, and the place at which they begin.
    has_earlier: bool = False
    begins_at: int = 1
    window: PromptWindow | None = None
    #: Parts for which there is a source, whether or not it found anything.
    available: frozenset[PromptPart] = frozenset()


@dataclass(frozen=True, slots=True)
class AssemblyPlan:
    """What goes into a prompt, and what does not."""

    room: int
    budgets: Budgets
    known: Known
    blocks: tuple[Candidate, ...]
    personal: tuple[Candidate, ...]
    recalled: tuple[Candidate, ...]
    summary: Candidate | None
    window: PromptWindow
    #: Tokens that the recent messages can have.
    recent_room: int
    omitted: Sequence[Omission] = field(default_factory=list)

    @property
    def fill(self) -> float:
        """How full the window is, from 0 to 1."""
        return self.window.tokens / self.recent_room if self.recent_room > 0 else 1.0

    def report(self) -> dict[str, Any]:
        """What the run shows of it, as JSON."""
        window, known = self.window, self.known
        recent = [one for one in known.history if one.seq >= window.first_seq]
        found: dict[str, Any] = {PromptPart.SYSTEM.value: {"tokens": known.system_tokens}}
        for part, used, budget in (
            (PromptPart.BLOCKS, self.blocks, self.budgets.blocks),
            (PromptPart.PERSONAL, self.personal, self.budgets.personal),
            (PromptPart.RECALLED, self.recalled, self.budgets.recalled),
        ):
            if part in known.available:
                found[part.value] = _part(used, budget)
        if PromptPart.SUMMARY in known.available:
            found[PromptPart.SUMMARY.value] = _part(
                () if self.summary is None else (self.summary,), self.budgets.summary
            )
        if recent or known.history or known.has_earlier:
            found[PromptPart.RECENT.value] = {
                "tokens": window.tokens,
                "budget": self.recent_room,
                "messages": len(recent),
                **({"first_seq": recent[0].seq, "last_seq": recent[-1].seq} if recent else {}),
                "moved": window.moved,
            }
        found[PromptPart.REQUEST.value] = {"tokens": known.request_tokens}
        listed = [one.document() for one in self.omitted[:MAX_LISTED]]
        return {"room": self.room, "parts": found, "left_out": listed, "left_out_count": len(self.omitted)}


def plan(known: Known, room: int, given: Mapping[str, int | None]) -> AssemblyPlan:
    """
    Return the plan for a prompt of at most `room` tokens. `given` has the budgets of the request, by part.

    Raises PromptTooLong.
    """
    fixed = known.system_tokens + known.request_tokens
    if fixed > room:
        raise PromptTooLong(fixed, room)
    budgets = parts.budgets(room - known.system_tokens, given, known.available)
    # A long request takes from the optional parts first, and from the window then.
    left = room - fixed
    if left < budgets.blocks + budgets.reserved:
        share = left / max(budgets.blocks + budgets.reserved, 1)
        budgets = Budgets(
            int(budgets.blocks * share),
            int(budgets.summary * share),
            int(budgets.personal * share),
            int(budgets.recalled * share),
            budgets.recent,
        )
    blocks, omitted = parts.chosen(PromptPart.BLOCKS, known.blocks, budgets.blocks)
    recent_room = left - sum(one.tokens for one in blocks) - budgets.reserved
    if budgets.recent is not None:
        recent_room = min(recent_room, budgets.recent)
    recent_room = max(recent_room, 0)
    usable = [one for one in known.summaries if one.tokens <= budgets.summary]
    window = fitted(
        known.history,
        recent_room,
        known.window,
        [one.seq for one in usable if one.seq is not None],
        has_earlier=known.has_earlier,
    )
    summary = next((one for one in usable if one.seq == window.summarised_upto), None)
    personal, more = parts.chosen(PromptPart.PERSONAL, known.personal, budgets.personal)
    omitted += more
    recalled, more = parts.chosen(PromptPart.RECALLED, known.recalled, budgets.recalled, window_from=window.first_seq)
    omitted += more
    omitted += _summaries_left_out(known, usable, budgets.summary)
    omitted += _messages_left_out(known, window, summary)
    return AssemblyPlan(room, budgets, known, blocks, personal, recalled, summary, window, recent_room, omitted)


def _summaries_left_out(known: Known, usable: Sequence[Candidate], budget: int) -> list[Omission]:
    return [
        Omission(PromptPart.SUMMARY, f"{one.tokens} tokens, and the budget is {budget}", one.id, one.tokens)
        for one in known.summaries
        if one not in usable
    ]


def _messages_left_out(known: Known, window: PromptWindow, summary: Candidate | None) -> list[Omission]:
    """The messages before the window: those that the summary has, and those that nothing has."""
    earliest = known.begins_at if known.has_earlier else min((one.seq for one in known.history), default=2**62)
    last = window.first_seq - 1
    if last < earliest:
        return []
    counted = {one.seq: one.tokens for one in known.history}
    upto = 0 if summary is None or summary.seq is None else min(summary.seq, last)
    found: list[Omission] = []

    def left_out(first: int, end: int, reason: str) -> None:
        places = range(first, end + 1)
        whole = first == earliest and end == last
        is_counted = not known.has_earlier and first >= earliest
        tokens = sum(counted.get(seq, 0) for seq in places) if is_counted else window.tokens_before if whole else None
        found.append(Omission(PromptPart.RECENT, reason, None, tokens, first, end))

    if upto >= earliest:
        left_out(earliest, upto, "before the window; the summary covers them")
    if last > upto:
        left_out(max(earliest, upto + 1), last, "before the window; no summary covers them yet")
    return found


def _part(used: Sequence[Candidate], budget: int) -> dict[str, Any]:
    tokens = sum(one.tokens for one in used)
    return {"tokens": tokens, "budget": budget, "used": [_used(one) for one in used]}


def _used(one: Candidate) -> dict[str, Any]:
    place = {} if one.seq is None else {"seq": one.seq}
    return {"id": one.id, "tokens": one.tokens, **place, **one.about}
