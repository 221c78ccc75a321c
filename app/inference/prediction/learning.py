"""A pass of the learning: the runs that have ended since the last one, a transaction for each part of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from app.inference.prediction import store
from app.inference.prediction.forecast import Basis
from app.inference.prediction.history import ModelHistory, StepSample, WorkflowHistory
from app.inference.prediction.learn import EndedRun, EndedStep, Knowledge, learn
from app.inference.prediction.residuals import Residuals
from app.kernel import log
from app.kernel.database import Database, UnitOfWork
from app.workflows.state_machine.states import RunState, StepState

_log = log.get(__name__)

#: Runs of one transaction.
_BATCH = 200


def learn_ended(database: Database, in_time: Callable[[], bool]) -> int:
    """Learn of the runs that have ended since the last pass, as far as the time allows. Returns their number."""
    learned = 0
    with database.work() as work:
        if not store.is_due(work):
            return 0
    while in_time():
        with database.work() as work:
            found = _learn_some(work)
        learned += found
        if found < _BATCH:
            break
    return learned


def _learn_some(work: UnitOfWork) -> int:
    cursor = store.lock_cursor(work)
    if cursor is None:
        return 0
    runs = store.ended_runs(work, cursor, _BATCH)
    if not runs:
        return 0
    succeeded = [run for run in runs if run.state == RunState.SUCCEEDED]
    if succeeded:
        _learn_all(work, succeeded)
    if len(runs) < _BATCH:
        store.forget(work)
    store.move_cursor(work, runs[-1].finished_at, runs[-1].id)
    return len(runs)


def _learn_all(work: UnitOfWork, runs: Sequence[Any]) -> None:
    steps: dict[UUID, list[Any]] = defaultdict(list)
    for row in store.steps_of(work, [run.id for run in runs]):
        steps[row.run_id].append(row)
    maps = [row.id for rows in steps.values() for row in rows if row.kind == "map" and row.items]
    items: dict[UUID, list[Any]] = defaultdict(list)
    for row in store.items_of(work, maps) if maps else ():
        items[row.parent_id].append(row)
    used = {row.model for rows in (*steps.values(), *items.values()) for row in rows if row.model is not None}
    models = {name: ModelHistory.of(state) for name, state in store.read(work, "model", used).items()}
    groups = {Basis(name): Residuals.of(state) for name, state in store.read_groups(work).items()}
    workflows = _workflows(work, runs)
    for run in runs:
        knowledge = Knowledge(workflows[run.namespace, run.workflow], models, groups)
        try:
            learn(knowledge, _ended(run, steps[run.id], items))
        except (ValueError, KeyError, TypeError, OverflowError) as error:  # a row of another version, or odd times
            _log.warning("run_not_learned", run_id=str(run.id), error=str(error))
            continue
        workflows[run.namespace, run.workflow] = knowledge.workflow
    store.write(
        work,
        {
            **{("workflow", namespace, name): one.state() for (namespace, name), one in workflows.items()},
            **{("model", "", name): model.state() for name, model in models.items()},
            **{("group", "", str(basis)): group.state() for basis, group in groups.items()},
        },
    )


def _workflows(work: UnitOfWork, runs: Sequence[Any]) -> dict[tuple[str, str], WorkflowHistory]:
    names: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        names[run.namespace].add(run.workflow)
    found: dict[tuple[str, str], WorkflowHistory] = {}
    for namespace, of in names.items():
        stored = store.read(work, "workflow", of, namespace)
        found |= {(namespace, name): WorkflowHistory.of(stored.get(name)) for name in of}
    return found


def _ended(run: Any, steps: Sequence[Any], items: dict[UUID, list[Any]]) -> EndedRun:
    seconds = None if run.was_paused else max(run.seconds, 0.0)
    listed = [_step(row, items[row.id], row.ready_at == run.created_at) for row in steps]
    return EndedRun(run.inputs_bytes or 0, seconds, run.expected, listed)


def _step(row: Any, items: Sequence[Any], is_first: bool) -> EndedStep:
    was_done = row.state == StepState.SUCCEEDED
    samples: list[StepSample] = []
    if was_done and row.kind == "map":
        samples = [_sample(item) for item in items if item.seconds is not None]
    elif was_done and row.took is not None:
        own = row.kind not in ("agent", "workflow", "wait", "refine", "ensemble") and row.seconds is not None
        samples = [_sample(row, waits=not is_first) if own else StepSample(max(row.took, 0.0))]
    return EndedStep(row.key, was_done, row.state == StepState.SKIPPED, samples, row.items)


def _sample(row: Any, *, waits: bool = False) -> StepSample:
    """Return what an attempt has used. The wait of a first step is that of its whole run, and counted there."""
    first = row.first_token_ms
    return StepSample(
        max(row.seconds, 0.0),
        row.model,
        row.tokens_in or 0,
        row.tokens_cached or 0,
        row.tokens_out or 0,
        None if first is None else first / 1000,
        max(row.waited, 0.0) if waits and row.attempt == 1 and row.waited is not None else None,
    )
