"""
The outcome of a probe: a pool is well, slow, hung, or it fails.

A pool is slow when it does not answer in time, has other requests, and its engine has made progress with them: it may
compute a long prompt for a minute. It is hung when it has no work and does not answer, or when it has work and has made
no progress for so long that no prompt explains it (the setting `fleet.progress_timeout`).
A slow pool is left alone; a hung one counts as one that fails.

Nothing here reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


class ProbeOutcome(StrEnum):
    """How a probe ended."""

    OK = "ok"
    SLOW = "slow"
    HUNG = "hung"
    FAILED = "failed"

    @property
    def is_bad(self) -> bool:
        """Whether it counts as a failure of the pool."""
        return self in (ProbeOutcome.HUNG, ProbeOutcome.FAILED)


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """What came back of a probe."""

    #: Seconds until the token, or the failure.
    seconds: float
    #: Why there is none; None: there is one.
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PoolProgress:
    """What a pool has reported of itself, after the time for an answer."""

    #: Requests that it works on: it has leases of steps, or its sign of life for direct requests.
    is_busy: bool
    #: How long its engine has had work without progress.
    stalled: timedelta


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How a probe ended, and why."""

    outcome: ProbeOutcome
    detail: str
    seconds: float | None = None


def judge(
    answer: ProbeAnswer | None, progress: PoolProgress, timeout: timedelta, progress_timeout: timedelta
) -> ProbeResult:
    """Return the outcome of a probe; `answer` is None when none came within `timeout`."""
    limit = f"{timeout.total_seconds():g} s"
    if answer is not None and answer.error is None:
        return ProbeResult(ProbeOutcome.OK, "", answer.seconds)
    if answer is not None:
        return ProbeResult(ProbeOutcome.FAILED, f"its probe failed: {answer.error}", answer.seconds)
    if not progress.is_busy:
        return ProbeResult(ProbeOutcome.HUNG, f"it is idle, and has not answered its probe within {limit}")
    if progress.stalled >= progress_timeout:
        seconds = progress.stalled.total_seconds()
        return ProbeResult(ProbeOutcome.HUNG, f"its engine has work, and made no progress for {seconds:.0f} s")
    return ProbeResult(ProbeOutcome.SLOW, f"it is busy: no answer to its probe within {limit}, but it makes progress")


def is_restarted(failures: int, restart_after: int, restarts: int, max_restarts: int) -> bool:
    """Whether a pool is restarted after so many failures in a row, and restarts of its model within an hour."""
    return bool(restart_after) and failures >= restart_after and restarts < max_restarts
