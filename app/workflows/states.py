"""The states of runs and steps: where each can stand, and what a run is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from app.workflows.steps import Fallback, Retry


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


Join = Literal["all", "any", "all_done"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What the definition says of a step, as far as its states depend on it."""

    #: The id of each step that it needs, and the branch of it if that matters.
    needs: tuple[tuple[str, str | None], ...] = ()
    join: Join = "all"
    #: It has a condition, or is a switch: it is decided before it begins.
    decided: bool = False
    retry: Retry = field(default_factory=Retry)
    #: How many models it can ask, and when the next is asked.
    models: int = 1
    fallback: Fallback | None = None
    allow_failure: bool = False
    #: It runs when the run does not succeed, and never otherwise.
    on_failure: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run."""

    key: str
    state: StepState
    rule: Rule
    #: Counts dispatches from 1; a message and a record name it, and an old one is refused. 0 before the first.
    attempt: int = 0
    #: Attempts that failed, with the model that it asks now.
    failures: int = 0
    #: Attempts whose worker died.
    losses: int = 0
    #: The place of the model that it asks now.
    model: int = 0
    #: The branch that it took.
    branch: str | None = None
    #: While it is awaited: items or a run are under way, and must end before it has.
    outside: bool = False
    #: Somebody was asked to decide it.
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """A run and its steps, by key."""

    id: str
    state: RunState
    steps: Mapping[str, Step]
    #: How it will end if it is cancelling or compensating.
    ending: RunState | None = None
    #: It has an output, and that is computed at its end, which can fail.
    computes_output: bool = False
