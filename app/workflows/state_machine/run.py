"""A run as a value: its state and its steps."""

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
    #: Counts dispatches from 1. A message or a record of an older attempt is refused. 0 before the first.
    attempt: int = 0
    #: Failed attempts with its present model.
    failures: int = 0
    #: Attempts whose worker died.
    losses: int = 0
    #: The index of its present model.
    model: int = 0
    #: The branch that it took.
    branch: str | None = None
    #: While it is awaiting: its work is done by items or by a called run, which must end before it does.
    delegated: bool = False
    #: The decision of its condition or its switch was requested.
    deciding: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """A run and its steps, by key."""

    id: str
    state: RunState
    steps: Mapping[str, RunStep]
    #: Its final state, while it is cancelling or compensating.
    ending: RunState | None = None
    #: Its output is computed at its end, which can fail.
    computes_output: bool = False
