"""
Retry: whether a failed attempt is followed by another, and after which delay.

A failure of the work counts against the step's own limit. The death of its worker counts against another limit, so that
a step that kills its workers is given up. A step that is requeued by a stopping worker counts against neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import log

from app.kernel.errors import FailureReason
from app.workflows.language.step_work import Retry

#: The holder left the work without failing at it.
NOT_COUNTED = frozenset({FailureReason.WORKER_STOPPED, FailureReason.CANCELLED})


@dataclass(frozen=True, slots=True)
class FailureCounts:
    """The counts of a step, this attempt included."""

    #: Attempts that ended in a failure of the work.
    failures: int
    #: Attempts that ended with their worker's death.
    losses: int


@dataclass(frozen=True, slots=True)
class Again:
    """A further attempt, after a delay."""

    delay: timedelta


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No further attempt, and why."""

    message: str


def decide(
    rule: Retry,
    reason: FailureReason,
    record: FailureCounts,
    *,
    max_losses: int,
    chance: float,
    retryable: bool = True,
    late: bool = False,
    final: bool = False,
    not_before: timedelta = timedelta(0),
) -> Again | GiveUp:
    """
    Decide what follows a failed attempt. `chance` is in [0, 1).

    `retryable` says whether the rule's condition holds for the error; `late` that the time for the whole step is over;
    `final` that the work was done and must not be repeated; `not_before` is the least delay, where a server requested
    one.

    Delays grow by `factor` up to `cap`, and each is drawn from the whole range below (full jitter),
    so that steps that failed together do not begin again together.
    """
    if final:
        return GiveUp("the work was done but its result cannot be stored, so it is not repeated")
    if reason in NOT_COUNTED:
        return Again(timedelta(0))  # the table makes a cancelled step of one that was cancelled
    if late:
        return GiveUp("the time for the whole step (total_timeout) is over")
    if reason is FailureReason.WORKER_LOST:
        if record.losses >= max_losses:
            return GiveUp(f"{record.losses} workers died while they held it: it is not given to another")
        return Again(timedelta(0))
    if not rule.retries(reason):
        return GiveUp(f"{reason} is not retried")
    if not retryable:
        return GiveUp("the condition of its retry rule does not hold for this error")
    if record.failures >= rule.max_attempts:
        return GiveUp(f"{record.failures} of {rule.max_attempts} attempts failed")
    return Again(max(_bound(rule, record.failures) * chance, not_before))


def _bound(rule: Retry, failures: int) -> timedelta:
    """The longest delay after so many failures. The logarithm finds the cap before the power overflows."""
    if not rule.delay:
        return timedelta(0)
    if rule.delay >= rule.cap or (failures - 1) * log(rule.factor) >= log(rule.cap / rule.delay):
        return rule.cap
    return rule.delay * rule.factor ** (failures - 1)
