"""
Fan-out: the counts of a map's items, and how many begin next.

At most `max_parallel` items are in flight; each that ends lets the next begin. Once an item has failed under
`on_error: fail`, or a cancel was requested, no further item begins. The map has ended when no item is in flight and
none is to begin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class MapEnding(StrEnum):
    """How a map ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class FanOut:
    """The items of a map, counted."""

    total: int
    #: Items that have not begun.
    waiting: int
    #: Items that have begun and not ended.
    in_flight: int = 0
    #: Items that failed.
    failed: int = 0
    #: No further item begins.
    stopping: bool = False
    #: Items that have ended with a text that was cut at `max_tokens`.
    truncated: int = 0
    #: Tokens of the attempts of items that have ended since the map was begun.
    tokens_in: int = 0
    tokens_out: int = 0


def refill(fan: FanOut, max_parallel: int) -> tuple[FanOut, int]:
    """How many items may begin now."""
    count = 0 if fan.stopping else max(min(max_parallel - fan.in_flight, fan.waiting), 0)
    return replace(fan, waiting=fan.waiting - count, in_flight=fan.in_flight + count), count


def item_ended(
    fan: FanOut,
    *,
    failed: bool,
    collect: bool,
    begun: bool = True,
    truncated: bool = False,
) -> FanOut:
    """
    An item has succeeded, failed or was cancelled.

    `begun` says whether it had begun, `truncated` whether its text was cut.
    """
    return replace(
        fan,
        waiting=fan.waiting - (not begun),
        in_flight=fan.in_flight - begun,
        failed=fan.failed + failed,
        stopping=fan.stopping or (failed and not collect),
        truncated=fan.truncated + truncated,
    )


def used(fan: FanOut, tokens_in: int, tokens_out: int) -> FanOut:
    """An attempt of an item has used tokens."""
    return replace(fan, tokens_in=fan.tokens_in + tokens_in, tokens_out=fan.tokens_out + tokens_out)


def ended(fan: FanOut, *, collect: bool) -> MapEnding | None:
    """How the map has ended; None while an item is in flight or may begin."""
    if fan.in_flight or (fan.waiting and not fan.stopping):
        return None
    if fan.failed and not collect:
        return MapEnding.FAILED
    return MapEnding.STOPPED if fan.stopping else MapEnding.SUCCEEDED
