"""The states of runs and steps: where each can stand, and what a run is made of."""

from __future__ import annotations

from enum import StrEnum


class StepState(StrEnum):
    """Where a step stands."""

    #: It waits for the steps that it needs.
    PENDING = "pending"
    #: It may begin; a message is on its way to a worker, or lost, and the sweep sends another.
    READY = "ready"
    #: A worker holds it under a lease.
    RUNNING = "running"
    #: It failed and begins again after a delay.
    WAITING = "waiting"
    #: Its work goes on without a holder: time passes, an event is to come, items or another run are under way.
    AWAITING = "awaiting"
    #: Its holder, its items or the run that it called were asked to stop and have not answered yet.
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: What it needs did not come about, its condition does not hold, or its branch was not taken.
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


class RunState(StrEnum):
    """Where a run stands."""

    #: It waits for another run of its concurrency key to end.
    BLOCKED = "blocked"
    #: No step has begun.
    QUEUED = "queued"
    RUNNING = "running"
    #: It is to end; some holder has not answered yet.
    CANCELLING = "cancelling"
    #: It has not succeeded, and does its `on_failure` steps.
    COMPENSATING = "compensating"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: States of a step that nothing leaves, but for a retry of the run.
FINAL_STEPS = frozenset({StepState.SUCCEEDED, StepState.FAILED, StepState.SKIPPED, StepState.CANCELLED})
#: States of a step in which a worker may hold it.
HELD_STEPS = frozenset({StepState.RUNNING, StepState.CANCELLING})
#: States of a run that nothing leaves, but for a retry of the run.
FINAL_RUNS = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})
