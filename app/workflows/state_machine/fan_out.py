"""
Fan-out: how far a map has come, and how many items begin next.

So many items are under way at a time; each that ends lets the next begin. Once one has failed for good under `fail`, or
a cancel was asked for, no other begins. The map has ended when nothing of it is under way and nothing is to begin.
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
    #: Items that were sent and have not ended.
    in_flight: int = 0
    #: Items that failed for good.
    failed: int = 0
    #: No other item begins.
    stopping: bool = False


def refill(fan: FanOut, max_parallel: int) -> tuple[FanOut, int]:
    """How many items may begin now."""
    count = 0 if fan.stopping else max(min(max_parallel - fan.in_flight, fan.waiting), 0)
    return replace(fan, waiting=fan.waiting - count, in_flight=fan.in_flight + count), count


def item_ended(fan: FanOut, *, failed: bool, collect: bool, begun: bool = True) -> FanOut:
    """An item has succeeded, failed for good or was cancelled; `begun` says whether it had been sent."""
    return replace(
        fan,
        waiting=fan.waiting - (not begun),
        in_flight=fan.in_flight - begun,
        failed=fan.failed + failed,
        stopping=fan.stopping or (failed and not collect),
    )


def ended(fan: FanOut, *, collect: bool) -> MapEnding | None:
    """How the map has ended; None while something of it is under way or may begin."""
    if fan.in_flight or (fan.waiting and not fan.stopping):
        return None
    if fan.failed and not collect:
        return MapEnding.FAILED
    return MapEnding.STOPPED if fan.stopping else MapEnding.SUCCEEDED
