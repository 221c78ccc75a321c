"""
Effects: what follows the commit of a transaction on runs, as values.

A transaction collects them, and its owner carries them out after the commit (`Runs.transaction`). The effects on other
runs each happen in a transaction of their own, so a transaction never locks two runs. The sweep repeats what was lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from app.kernel.database import QueryResult
from app.workflows.runs.messages import StepMessage


@dataclass(frozen=True, slots=True)
class PublishItems:
    """Send the messages of items of a map that became ready."""

    workflow: str
    #: `ReadyStep`s; they are read after the commit, with which they arrive.
    items: QueryResult


@dataclass(frozen=True, slots=True)
class AnswerCaller:
    """Give the result of a run that has ended to the step that called it."""

    run_id: UUID


@dataclass(frozen=True, slots=True)
class AdmitRuns:
    """Begin blocked runs of a concurrency key, as far as its limit allows."""

    concurrency_key: str


@dataclass(frozen=True, slots=True)
class CancelRun:
    """Cancel a run."""

    run_id: UUID
    message: str


@dataclass(frozen=True, slots=True)
class CancelCalledRuns:
    """Cancel the runs that a step has called."""

    step_id: UUID


Effect = StepMessage | PublishItems | AnswerCaller | AdmitRuns | CancelRun | CancelCalledRuns


def of_ended_run(run_id: UUID, parent_step_id: UUID | None, concurrency_key: str | None) -> list[Effect]:
    """The effects of the end of a run."""
    effects: list[Effect] = []
    if parent_step_id is not None:
        effects.append(AnswerCaller(run_id))
    if concurrency_key is not None:
        effects.append(AdmitRuns(concurrency_key))
    return effects
