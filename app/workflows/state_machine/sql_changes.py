"""
State changes in SQL: every statement that writes the state of a run or a step, with the transitions that it makes.

A state change passes through `transitions.proceed`, which needs the run and its definition in memory. Two of the
statements listed here write what `proceed` has decided; the others decide in SQL, each for its reason. Their
transitions are in the same tables.
A test finds statements that are not listed, and one executes the listed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.workflows.state_machine.states import FINAL_RUNS, FINAL_STEPS, RunState, StepState
from app.workflows.state_machine.transitions import StepChange

_OPEN_STEPS = frozenset(StepState) - FINAL_STEPS
_OPEN_RUNS = frozenset(RunState) - FINAL_RUNS


@dataclass(frozen=True, slots=True)
class SqlChange:
    """A statement that writes states."""

    #: The module below `app.workflows.runs`, and the name there.
    statement: str
    reason: str
    #: Keys of `TRANSITIONS`.
    steps: frozenset[tuple[StepState, StepChange]] = frozenset()
    #: Old and new states of `RUN_TRANSITIONS`.
    runs: frozenset[tuple[RunState, RunState]] = frozenset()
    #: The states of rows that it inserts.
    created: frozenset[RunState | StepState] = frozenset()


SQL_CHANGES = (
    SqlChange("storage.store._MOVE_STEP", "writes what `transitions.proceed` has decided"),
    SqlChange("storage.store._MOVE_RUN", "writes what `transitions.proceed` has decided"),
    SqlChange(
        "storage.store._INSERT_RUN",
        "a new run; it is blocked where its concurrency key has no free place",
        created=frozenset({RunState.BLOCKED, RunState.QUEUED}),
    ),
    SqlChange("storage.store._INSERT_STEPS", "the steps of a new run", created=frozenset({StepState.PENDING})),
    SqlChange(
        "storage.store._CLAIM",
        "a claim is a compare-and-set: it waits for no lock of the run, and reads no other step",
        steps=frozenset({(StepState.READY, StepChange.CLAIMED)}),
        runs=frozenset({(RunState.QUEUED, RunState.RUNNING)}),
    ),
    SqlChange(
        "storage.store._BEGIN_RUN",
        "completes a claim that could not lock the run",
        runs=frozenset({(RunState.QUEUED, RunState.RUNNING)}),
    ),
    SqlChange(
        "storage.items._INSERT",
        "the items of a map: there may be too many to load them",
        created=frozenset({StepState.PENDING}),
    ),
    SqlChange(
        "storage.items._RESET",
        "a map that is retried does the items again that did not succeed: there may be too many to load them",
        steps=frozenset((state, StepChange.RETRIED) for state in FINAL_STEPS),
    ),
    SqlChange(
        "storage.items._START",
        "the next items of a map, by count (`fan_out.refill`): there may be too many to load them",
        steps=frozenset({(StepState.PENDING, StepChange.NEEDS_MET)}),
    ),
    SqlChange(
        "storage.items._STOP",
        "all open items of a map: there may be too many to load them",
        steps=frozenset((state, StepChange.CANCEL_REQUESTED) for state in _OPEN_STEPS),
    ),
    SqlChange(
        "storage.agent_items._APPEND",
        "the next items of an agent",
        created=frozenset({StepState.PENDING}),
    ),
    SqlChange(
        "storage.agent_items._REOPEN",
        "an agent that is retried goes on after its last whole turn: the items are not loaded with the run",
        steps=frozenset(
            (state, StepChange.RETRIED) for state in (StepState.FAILED, StepState.CANCELLED, StepState.SKIPPED)
        ),
    ),
    SqlChange(
        "forks._COPY_STEPS",
        "a fork takes the outputs of another run",
        steps=frozenset({(StepState.PENDING, StepChange.COPIED)}),
    ),
    SqlChange("forks._COPY_ITEMS", "a fork takes the ended items of another run", created=FINAL_STEPS),
    SqlChange(
        "recovery.abandon._END_RUN",
        "the definition of the run, or the transition table, raises an error",
        runs=frozenset((state, RunState.FAILED) for state in _OPEN_RUNS),
    ),
    SqlChange(
        "recovery.abandon._END_STEPS",
        "as for its run",
        steps=frozenset((state, StepChange.ABANDONED) for state in _OPEN_STEPS),
    ),
)
