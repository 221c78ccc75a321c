"""The states of runs and steps."""

from __future__ import annotations

from enum import StrEnum


class StepState(StrEnum):
    """The state of a step."""

    #: It waits for the steps that it needs.
    PENDING = "pending"
    #: It can be claimed; a message was sent to its workers. If that was lost, the sweep sends another.
    READY = "ready"
    #: A worker holds it under a lease.
    RUNNING = "running"
    #: An attempt failed; the next begins after a delay.
    WAITING = "waiting"
    #: It has no holder: it waits for time or an event, or its work is delegated to items or a called run.
    AWAITING = "awaiting"
    #: Its holder, its items or the run that it called were asked to stop, and have not ended yet.
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: Its needs cannot be met, or its condition does not hold.
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


class RunState(StrEnum):
    """The state of a run."""

    #: It waits for the end of another run of its concurrency key.
    BLOCKED = "blocked"
    #: No step has begun.
    QUEUED = "queued"
    RUNNING = "running"
    #: Its end was requested; some step has not ended yet.
    CANCELLING = "cancelling"
    #: It has not succeeded, and executes its `on_failure` steps.
    COMPENSATING = "compensating"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: Final states of a step; only a retry of the run leaves them.
FINAL_STEPS = frozenset({StepState.SUCCEEDED, StepState.FAILED, StepState.SKIPPED, StepState.CANCELLED})
#: States of a step in which a worker may hold it.
HELD_STEPS = frozenset({StepState.RUNNING, StepState.CANCELLING})
#: Final states of a run; only a retry leaves them.
FINAL_RUNS = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})
