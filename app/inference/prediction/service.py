"""
Predictions as others use them: the expected time of a run at its submission, and of what is left of a run.

What was learned is read again after some seconds, the queues after one; each is read once for all calls meanwhile. A
prediction that cannot be made is logged and left out: it never stops a submission.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any

from app.catalog.catalog import Catalog
from app.inference import queues, waiting
from app.inference.prediction import forecast as forecasts
from app.inference.prediction import store
from app.inference.prediction.forecast import Basis, Forecast, Learned, StepProgress
from app.inference.prediction.history import ModelHistory, WorkflowHistory
from app.inference.prediction.residuals import Residuals
from app.inference.prediction.timeline import ModelSlots
from app.inference.waiting import ModelQueue
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, InvalidInput, Problem
from app.kernel.priority import Priority
from app.kernel.sections.predictions import PredictionSettings
from app.kernel.units import durations
from app.workflows.language.definition import Definition, from_document
from app.workflows.runs.details import RunView, StepDetails
from app.workflows.runs.submission import Prepared
from app.workflows.state_machine.states import FINAL_STEPS, StepState

_log = log.get(__name__)

#: Seconds for which a read of the queues, and one of what was learned, is valid.
_QUEUES_VALID, _LEARNED_VALID = 1.0, 10.0
#: Workflows that are kept in memory.
_MOST_KEPT = 200
#: Seconds of a start of a pool that was never measured.
_START = 10.0
#: Most steps of a definition whose run is predicted: beyond that a forecast takes longer than it is worth.
_MOST_STEPS = 2_000


class Predictions:
    """The predictions of one process."""

    def __init__(self, database: Database, catalog: Callable[[], Catalog], settings: Callable[[], PredictionSettings]):
        """Does not connect."""
        self._database, self._catalog, self._settings = database, catalog, settings
        self._lock = threading.Lock()
        self._workflows: dict[tuple[str, str], tuple[float, WorkflowHistory]] = {}
        self._models: dict[str, tuple[float, ModelHistory]] = {}
        self._groups: tuple[float, Mapping[Basis, Residuals]] = (0.0, {})
        self._queues: dict[str, tuple[float, ModelQueue]] = {}
        self._definitions: dict[str, Definition] = {}

    def expect(self, prepared: Prepared) -> dict[str, Any] | None:
        """
        Return the forecast of a submission, as it is stored; None where none can be made.

        Raises InvalidInput when the run cannot meet its deadline, unless the settings say that it is only warned.
        """
        run = prepared.run
        try:
            found = self._forecast(
                prepared.definition, run["namespace"], run["priority"], len(prepared.inputs_text.encode())
            )
        except ArrieroError as error:
            _log.warning("run_not_predicted", error=str(error))
            return None
        if found is None:
            return None
        return forecasts.as_stored(found, self._checked(found, run["deadline"]))

    def left(self, view: RunView, at: datetime, written: Mapping[str, int]) -> Forecast | None:
        """Return the forecast of what is left of a run. `written` are the tokens of its running steps so far."""
        run = view.run
        if run.finished_at is not None or run.paused:
            return None
        ended = frozenset(step.key for step in view.steps if StepState(step.state) in FINAL_STEPS)
        progress = {step.key: _progress(step, at, written.get(step.key)) for step in view.steps}
        try:
            return self._forecast(
                self._definition(view), run.namespace, run.priority, run.inputs_bytes or 0, progress, ended, str(run.id)
            )
        except ArrieroError as error:
            _log.warning("run_not_predicted", run_id=str(run.id), error=str(error))
            return None

    def _definition(self, view: RunView) -> Definition:
        found = self._definitions.get(view.run.sha256)
        if found is None:
            found = self._definitions[view.run.sha256] = from_document(view.definition)
            while len(self._definitions) > _MOST_KEPT:
                self._definitions.pop(next(iter(self._definitions)), None)
        return found

    def _checked(self, found: Forecast, deadline: timedelta | None) -> str | None:
        """Return a warning for a deadline that will probably not be met. Raises InvalidInput."""
        rule, low, high = self._settings().deadlines, found.interval.low, found.interval.high
        if deadline is None or rule == "ignore" or found.interval.seconds <= deadline.total_seconds():
            return None
        predicted = f"{_shown(found.interval.seconds)} (80 % of such runs: {_shown(low)} to {_shown(high)})"
        message = f"{durations.show(deadline)} cannot be met: the run is expected to take {predicted}"
        if rule == "refuse" and found.is_calibrated and low > deadline.total_seconds():
            accepted = f"{_shown(high)} or more, no deadline, or another time: the run was not submitted"
            raise InvalidInput([Problem("deadline", message, accepted)], "run")
        return f"deadline: {durations.show(deadline)} will probably not be met: the run is expected to take {predicted}"

    def _forecast(
        self,
        definition: Definition,
        namespace: str,
        priority: str,
        inputs_bytes: int,
        progress: Mapping[str, StepProgress] = forecasts.NOTHING_DONE,
        ended: frozenset[str] = frozenset(),
        run_id: str | None = None,
    ) -> Forecast | None:
        if len(definition.steps) > _MOST_STEPS:
            return None
        names = definition.models()
        with self._lock:
            histories = self._read_models(names)
            found = self._read_queues(names)
            learned = Learned(
                self._read_workflow(namespace, definition.workflow),
                histories,
                {name: _slots(queue, priority, histories[name], run_id) for name, queue in found.items()},
                self._read_groups(),
            )
        return forecasts.forecast(definition, learned, inputs_bytes, progress, ended)

    def _read_workflow(self, namespace: str, name: str) -> WorkflowHistory:
        key, now = (namespace, name), time.monotonic()
        kept = self._workflows.get(key)
        if kept is not None and kept[0] > now:
            return kept[1]
        with self._database.work() as work:
            found = WorkflowHistory.of(store.read(work, "workflow", [name], namespace).get(name))
        self._workflows.pop(key, None)
        self._workflows[key] = (now + _LEARNED_VALID, found)
        while len(self._workflows) > _MOST_KEPT:
            self._workflows.pop(next(iter(self._workflows)))
        return found

    def _read_models(self, names: Collection[str]) -> dict[str, ModelHistory]:
        now = time.monotonic()
        stale = [name for name in names if self._models.get(name, (0.0, None))[0] <= now]
        if stale:
            with self._database.work() as work:
                stored = store.read(work, "model", stale)
            self._models |= {name: (now + _LEARNED_VALID, ModelHistory.of(stored.get(name))) for name in stale}
        found = {name: self._models[name][1] for name in names}
        self._models = {name: one for name, one in self._models.items() if one[0] > now}
        return found

    def _read_groups(self) -> Mapping[Basis, Residuals]:
        now = time.monotonic()
        if self._groups[0] <= now:
            with self._database.work() as work:
                stored = store.read_groups(work)
            self._groups = now + _LEARNED_VALID, {Basis(name): Residuals.of(one) for name, one in stored.items()}
        return self._groups[1]

    def _read_queues(self, names: Collection[str]) -> dict[str, ModelQueue]:
        now, catalog = time.monotonic(), self._catalog()
        known = {name: catalog.get(name) for name in names if name in catalog.names}
        stale = [model for name, model in known.items() if self._queues.get(name, (0.0, None))[0] <= now]
        if stale:
            read = queues.read(self._database, stale)
            self._queues |= {name: (now + _QUEUES_VALID, queue) for name, queue in read.items()}
        found = {name: self._queues[name][1] for name in known}
        self._queues = {name: one for name, one in self._queues.items() if one[0] > now}
        return found


def _slots(queue: ModelQueue, priority: str, history: ModelHistory, run_id: str | None) -> ModelSlots:
    """Return the slots of a model for a step of that class, which comes now or waits already."""
    of_run = run_id if run_id in queue.runs else None
    seconds = waiting.estimate(queue, of_run, Priority(priority)).seconds
    if seconds is None:
        seconds = queue.load or _START
    return ModelSlots(queue.slots or queue.slots_per_pool, seconds, history.wait.mean)


def _progress(step: StepDetails, at: datetime, written: int | None) -> StepProgress:
    left = None if step.items is None else (step.items_waiting or 0) + (step.items_in_flight or 0)
    due = step.not_before
    if step.state in (StepState.WAITING, StepState.AWAITING) and due is not None:
        return StepProgress(due_in=max((due - at).total_seconds(), 0.0), items_left=left)
    if step.started_at is None or step.state in (StepState.READY, StepState.PENDING):
        return StepProgress(items_left=left)
    return StepProgress(max((at - step.started_at).total_seconds(), 0.0), written, left)


def _shown(seconds: float) -> str:
    return durations.show(timedelta(seconds=round(seconds, 1) if seconds < 10 else round(seconds)))
