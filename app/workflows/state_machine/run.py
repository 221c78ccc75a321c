"""A run as a value: its steps, and where each stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.workflows.language.rule import StepRule
from app.workflows.state_machine.states import RunState, StepState


@dataclass(frozen=True, slots=True)
class RunStep:
    """One step of a run."""

    key: str
    state: StepState
    rule: StepRule
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
    delegated: bool = False
    #: Somebody was asked to decide it.
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """A run and its steps, by key."""

    id: str
    state: RunState
    steps: Mapping[str, RunStep]
    #: How it will end if it is cancelling or compensating.
    ending: RunState | None = None
    #: It has an output, and that is computed at its end, which can fail.
    computes_output: bool = False
