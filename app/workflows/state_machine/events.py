"""Events: what can happen to a run, told in the past tense; and commands: what follows, told in the imperative."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from app.kernel.errors import FailureReason
from app.workflows.state_machine.states import RunState


@dataclass(frozen=True, slots=True)
class RunSubmitted:
    """The run was written; nothing of it has begun."""


@dataclass(frozen=True, slots=True)
class RunAdmitted:
    """The run waits no longer for others of its concurrency key."""


@dataclass(frozen=True, slots=True)
class StepDecided:
    """A condition or a switch was computed."""

    key: str
    #: Whether the condition holds; None when it could not be computed.
    holds: bool | None
    #: For a switch: it is one, and took this branch, or none.
    switch: bool = False
    branch: str | None = None


@dataclass(frozen=True, slots=True)
class StepClaimed:
    """A worker took the step."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepAwaited:
    """The holder left the step: its work goes on elsewhere, or it waits for time or an event."""

    key: str
    attempt: int
    #: Items or a run are under way.
    delegated: bool


@dataclass(frozen=True, slots=True)
class StepSucceeded:
    """The holder delivered an output, or what was awaited came."""

    key: str
    attempt: int
    branch: str | None = None


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The attempt ended badly: its holder said so, or its lease ran out."""

    key: str
    attempt: int
    reason: FailureReason
    #: Drawn from [0, 1) by the caller, for the jitter of the delay.
    chance: float
    #: Setting runs.max_worker_losses.
    max_losses: int
    #: What the condition of the retry rule says of the error.
    retryable: bool = True
    #: The time for the whole step is over.
    late: bool = False
    #: The least delay before another attempt, as a server asked for it.
    not_before: timedelta = timedelta(0)
    #: The work was done, and must not be done again.
    final: bool = False


@dataclass(frozen=True, slots=True)
class DelayOver:
    """The delay before another attempt has passed."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepOutOfTime:
    """The time for the whole step is over, and nobody holds it."""

    key: str


@dataclass(frozen=True, slots=True)
class StepCancelRequested:
    """Somebody wants one step to end."""

    key: str


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The run is to end: somebody wants that (cancelled), or its deadline has passed (failed)."""

    ending: RunState = RunState.CANCELLED


@dataclass(frozen=True, slots=True)
class OutputComputed:
    """The expressions of the run's output were computed; False when that failed."""

    made: bool


@dataclass(frozen=True, slots=True)
class RetryRequested:
    """Somebody wants what did not succeed to be done again."""


Event = (
    RunSubmitted
    | RunAdmitted
    | StepDecided
    | StepClaimed
    | StepAwaited
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
    """Compute the condition of this step, or its branch, and tell."""

    key: str


@dataclass(frozen=True, slots=True)
class DispatchStep:
    """Send a message to the workers of this step."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class DelayStep:
    """Let the step wait; the sweep brings it back."""

    key: str
    delay: timedelta


@dataclass(frozen=True, slots=True)
class StopStep:
    """Ask the holder, the items or the called run to leave the step."""

    key: str


@dataclass(frozen=True, slots=True)
class NoteGivenUp:
    """Write down why there is no other attempt."""

    key: str
    message: str


@dataclass(frozen=True, slots=True)
class ComputeOutput:
    """Compute the run's output, and tell."""


@dataclass(frozen=True, slots=True)
class FinishRun:
    """The run has ended in this state."""

    state: RunState


Command = DecideStep | DispatchStep | DelayStep | StopStep | NoteGivenUp | ComputeOutput | FinishRun
