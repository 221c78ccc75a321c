"""Events that can happen to a run (past tense), and the commands that follow (imperative)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from app.kernel.errors import FailureReason
from app.workflows.state_machine.states import RunState


@dataclass(frozen=True, slots=True)
class RunSubmitted:
    """The run was written."""


@dataclass(frozen=True, slots=True)
class RunAdmitted:
    """The run no longer waits for others of its concurrency key."""


@dataclass(frozen=True, slots=True)
class StepDecided:
    """A condition or a switch was computed."""

    key: str
    #: Whether the condition holds; None when it could not be computed.
    holds: bool | None
    #: Whether it is a switch, and the branch that it took, if any.
    switch: bool = False
    branch: str | None = None


@dataclass(frozen=True, slots=True)
class StepClaimed:
    """A worker claimed the step."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepAwaited:
    """The holder left the step: its work is delegated, or it waits for time or an event."""

    key: str
    attempt: int
    #: Its work is done by items or by a called run.
    delegated: bool


@dataclass(frozen=True, slots=True)
class StepResumed:
    """The items of the step have ended, and its holder decides what follows: it is dispatched again."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepSucceeded:
    """The holder recorded an output, or the wait or the delegated work ended well."""

    key: str
    attempt: int
    branch: str | None = None


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The attempt failed: its holder recorded that, or its lease expired."""

    key: str
    attempt: int
    reason: FailureReason
    #: Drawn from [0, 1) by the caller, for the jitter of the delay.
    chance: float
    #: Setting runs.max_worker_losses.
    max_losses: int
    #: Whether the condition of the retry rule holds for the error.
    retryable: bool = True
    #: The time for the whole step is over.
    late: bool = False
    #: The least delay before another attempt, as a server requested.
    not_before: timedelta = timedelta(0)
    #: The work was done, and must not be repeated.
    final: bool = False


@dataclass(frozen=True, slots=True)
class DelayOver:
    """The delay before another attempt has passed."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepOutOfTime:
    """The time for the whole step is over, and no worker holds it."""

    key: str


@dataclass(frozen=True, slots=True)
class StepCancelRequested:
    """The end of one step was requested."""

    key: str


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The end of the run was requested (cancelled), or its deadline has passed (failed)."""

    ending: RunState = RunState.CANCELLED


@dataclass(frozen=True, slots=True)
class OutputComputed:
    """The run's output was computed."""

    #: False when an expression failed.
    made: bool


@dataclass(frozen=True, slots=True)
class RetryRequested:
    """A retry of the steps that did not succeed was requested."""


Event = (
    RunSubmitted
    | RunAdmitted
    | StepDecided
    | StepClaimed
    | StepAwaited
    | StepResumed
    | StepSucceeded
    | StepFailed
    | DelayOver
    | StepOutOfTime
    | StepCancelRequested
    | CancelRequested
    | OutputComputed
    | RetryRequested
)


@dataclass(frozen=True, slots=True)
class DecideStep:
    """Compute the condition or the branch of this step; `StepDecided` follows."""

    key: str


@dataclass(frozen=True, slots=True)
class DispatchStep:
    """Send a message to the workers of this step."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class DelayStep:
    """Let the step wait; the sweep makes it ready."""

    key: str
    delay: timedelta


@dataclass(frozen=True, slots=True)
class StopStep:
    """Stop the holder, the items or the called run of the step."""

    key: str


@dataclass(frozen=True, slots=True)
class NoteGivenUp:
    """Store why there is no further attempt."""

    key: str
    message: str


@dataclass(frozen=True, slots=True)
class ComputeOutput:
    """Compute the run's output; `OutputComputed` follows."""


@dataclass(frozen=True, slots=True)
class FinishRun:
    """The run has ended in this state."""

    state: RunState


Command = DecideStep | DispatchStep | DelayStep | StopStep | NoteGivenUp | ComputeOutput | FinishRun
