"""
Notifications: messages about alerts, one for each channel and group, and when a failed delivery is tried again.

A message keeps its id over all attempts, so that a receiver that got it before a crash knows it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

#: The pause after each failed attempt; after the last one the delivery has failed. In all about 19 hours.
RETRY_AFTER = tuple(timedelta(seconds=seconds) for seconds in (5, 30, 120, 600, 1800, 2 * 3600, 6 * 3600, 10 * 3600))
#: A pause is longer or shorter by at most this part of it, so that channels that failed together do not retry together.
_JITTER = 0.2
#: The longest pause that a receiver can ask for.
_LONGEST = timedelta(days=1)


class NotificationKind(StrEnum):
    """What a message says."""

    FIRING = "firing"
    RESOLVED = "resolved"
    TEST = "test"


class DeliveryState(StrEnum):
    """Where a delivery is."""

    PENDING = "pending"
    SENT = "sent"
    #: No attempt is left.
    FAILED = "failed"
    #: Its channel is gone or disabled.
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class AlertNotification:
    """A notification, as it is stored."""

    id: UUID
    namespace: str
    channel: str
    kind: str
    group_key: str
    document: dict[str, Any]
    state: str
    attempts: int
    due_at: datetime
    error: str
    created_at: datetime
    finished_at: datetime | None


class DeliveryFailed(Exception):
    """An attempt to deliver failed, with the reason."""

    def __init__(self, reason: str, *, retry_after: timedelta | None = None, final: bool = False) -> None:
        #: The receiver asks for at least this pause.
        self.retry_after = retry_after
        #: No further attempt would help.
        self.final = final
        super().__init__(reason)


def pause_after(attempts: int, chance: float, retry_after: timedelta | None = None) -> timedelta | None:
    """
    Return the pause after so many failed attempts; None when there is no further one. `chance` is from [0, 1).

    A receiver that asks for a longer pause gets it.
    """
    if attempts > len(RETRY_AFTER):
        return None
    pause = RETRY_AFTER[attempts - 1] * (1 + _JITTER * (2 * chance - 1))
    return pause if retry_after is None else max(pause, min(retry_after, _LONGEST))
