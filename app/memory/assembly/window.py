"""
The window: which messages of a conversation a prompt has, from a place on up to the last one.

The window begins at a turn, and stays where it is until it is full. It then moves far, so that it stays there for long:
the engine computes a prompt again from the first token that differs, so a window that moved with each turn would be
computed anew each time. Where a summary ends, the window moves to the first message after it.

Nothing here knows a model or a database: tokens are counted by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: The share of its room that a window keeps when it moves.
KEPT_SHARE = 0.5
#: The most of its room that may be used after it moved to the end of a summary; otherwise it moves further.
_AFTER_SUMMARY = 0.75
#: A window that uses less of its room, while earlier messages would fit, is begun anew: the room has become larger.
_TOO_SMALL = 0.25


@dataclass(frozen=True, slots=True)
class CountedMessage:
    """The place and the length of a message."""

    seq: int
    tokens: int
    #: A message of the user: nothing before it belongs to what follows.
    begins_turn: bool


@dataclass(frozen=True, slots=True)
class PromptWindow:
    """The window of one prompt."""

    #: The place of its first message; one after the last one for an empty window.
    first_seq: int
    #: Of its messages.
    tokens: int
    #: The last place that the summary covers which belongs to this window; 0 without one.
    summarised_upto: int = 0
    #: Tokens of the messages before it, which were in the window once; None when they were never counted.
    tokens_before: int | None = 0
    #: Its place differs from that of the last prompt.
    moved: bool = False


def fitted(
    messages: Sequence[CountedMessage],
    room: int,
    before: PromptWindow | None,
    summaries: Sequence[int],
    *,
    has_earlier: bool,
) -> PromptWindow:
    """
    Return the window for a prompt with so many tokens of room.

    `messages` are the last ones in order, at least as many as fit, or all since the last window began; `has_earlier`
    says whether there are messages before them. `before` is the window of the last prompt. `summaries` has the last
    place of each summary.
    """
    end = messages[-1].seq + 1 if messages else 1 if before is None else before.first_seq
    if before is not None and (not messages or messages[0].seq <= before.first_seq):
        kept = [one for one in messages if one.seq >= before.first_seq]
        used = sum(one.tokens for one in kept)
        could_have_more = bool(messages) and messages[0].seq < before.first_seq
        # It began behind a turn that was too long, and this is its answer.
        is_inside_turn = could_have_more and bool(kept) and not kept[0].begins_turn
        if used <= room and not is_inside_turn and not (could_have_more and used < _TOO_SMALL * room):
            return PromptWindow(before.first_seq, used, before.summarised_upto, before.tokens_before)
    elif before is None and not has_earlier:
        used = sum(one.tokens for one in messages)
        if used <= room:
            return PromptWindow(messages[0].seq if messages else 1, used)
    latest = max(summaries, default=0)
    first = _first(messages, room, latest, end)
    tokens = sum(one.tokens for one in messages if one.seq >= first)
    upto = max((one for one in summaries if one < first), default=0)
    moved = before is None or first != before.first_seq
    return PromptWindow(first, tokens, upto, _tokens_before(messages, first, before, has_earlier), moved)


def _first(messages: Sequence[CountedMessage], room: int, summarised: int, end: int) -> int:
    """The place to which the window moves."""
    after = sum(one.tokens for one in messages if one.seq > summarised)
    begins = [one.seq for one in messages if one.begins_turn]
    if summarised and messages and messages[0].seq <= summarised + 1 and after <= _AFTER_SUMMARY * room:
        return min((seq for seq in begins if seq > summarised), default=end)
    left, fits = 0, end
    for one in reversed(messages):
        left += one.tokens
        if left > KEPT_SHARE * room and fits < end:
            break
        if left > room:
            break
        if one.begins_turn:
            fits = one.seq
    return fits


def _tokens_before(
    messages: Sequence[CountedMessage], first: int, before: PromptWindow | None, has_earlier: bool
) -> int | None:
    """Tokens of the messages before a place, if all of them were counted once."""
    if before is None:
        return None if has_earlier else sum(one.tokens for one in messages if one.seq < first)
    if before.tokens_before is None or not messages or messages[0].seq > before.first_seq:
        return None
    if first < before.first_seq:
        return None
    return before.tokens_before + sum(one.tokens for one in messages if before.first_seq <= one.seq < first)


def cut(messages: Sequence[CountedMessage], keep: int, after: int) -> int | None:
    """
    Return the last place that a new summary covers, so that at most `keep` tokens of messages are left; None when
    no turn ends in between. `after` is the last place that the summary before covers.
    """
    left, found = 0, None
    for one in reversed(messages):
        if one.seq <= after:
            break
        left += one.tokens
        if left > keep and found is not None:
            break
        if one.begins_turn:
            found = one.seq - 1
    return found if found is not None and found > after and left > keep else None
