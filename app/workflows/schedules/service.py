"""
The schedule service: put, get, pause, resume, trigger and delete schedules, and start due fires.

Each fire is a row, one for each instant, written while the schedule is locked.
The run of a fire is submitted afterwards, with an idempotency key that is derived from the instant. So an instant has
one run, whatever the number of concurrent schedulers and wherever one of them dies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

from app.access import namespaces
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import (
    ArrieroError,
    IdempotencyKeyReused,
    InvalidInput,
    NotFound,
    Problem,
    RowsLocked,
    Unavailable,
    shortened,
)
from app.workflows import registry
from app.workflows.language import inputs as run_inputs
from app.workflows.runs.changes.transactions import begin
from app.workflows.runs.recovery.abandon import reason_of
from app.workflows.runs.service import Runs
from app.workflows.runs.storage.payloads import as_json
from app.workflows.runs.submission import Submission
from app.workflows.schedules import check, inputs, store, timetable
from app.workflows.schedules.overlap import ActiveFire, FireState, decide_overlap
from app.workflows.schedules.schedule import Schedule
from app.workflows.schedules.timetable import Fire, Missed, Timetable
from app.workflows.state_machine.states import FINAL_RUNS, RunState

_log = log.get(__name__)

#: Maximum number of schedules in one pass; the next pass continues.
BATCH = 500
#: How long a pass waits for rows that another transaction has locked.
_LOCK_WAIT = timedelta(milliseconds=100)

_PAUSED = "the schedule was paused"

#: States of a run that has ended or is ending.
_ENDING = FINAL_RUNS | {RunState.CANCELLING, RunState.COMPENSATING}


@dataclass(frozen=True, slots=True)
class ScheduleView:
    """A schedule with its last fire, its last run and its next fire."""

    row: Any
    schedule: Schedule
    #: In the schedule's time zone; None while it is paused, and after its end.
    next: Fire | None

    @property
    def state(self) -> str:
        """`active`, `paused` or `ended`."""
        if self.row.paused_at is not None:
            return "paused"
        return "active" if self.next is not None else "ended"


@dataclass(frozen=True, slots=True)
class FirePage:
    """A page of fires as rows, and the cursor of the next page, if any."""

    fires: Sequence[Any]
    next_cursor: UUID | None


@dataclass(frozen=True, slots=True)
class _FollowUp:
    """The work after the commit of a decision."""

    #: Rows of the fires whose run must be submitted.
    start: Sequence[Any]
    #: Ids of the runs that must be cancelled.
    cancel: Sequence[UUID]


@dataclass(frozen=True, slots=True)
class Schedules:
    """The operations on schedules. The fields are their dependencies."""

    runs: Runs
    #: How long decided fires are kept (the setting schedules.keep_fires).
    keep: timedelta
    #: The namespace of the schedules that are named.
    namespace: str = namespaces.DEFAULT

    @property
    def database(self) -> Database:
        """The database of the runs and schedules."""
        return self.runs.database

    def put(self, schedule: Schedule) -> tuple[ScheduleView, bool]:
        """
        Store a schedule under its name. The second value is False when it replaced another one.

        Instants before the first store do not fire. Fires that became due before a change are decided by the old
        document.

        Raises InvalidInput when the workflow does not exist or does not accept the inputs.
        """
        with begin(self.database, self.runs.lock_wait) as work:
            now = store.now(work)
        if problems := list(self._problems(schedule, now)):
            raise InvalidInput(problems, check.SUBJECT)
        name, document = schedule.schedule, as_json(schedule.document())
        with begin(self.database, self.runs.lock_wait) as work:
            store.lock_name(work, self.namespace, name)
            row, now = store.lock(work, self.namespace, name), store.now(work)
            if row is None:
                schedule_id, decided_to = ids.new_id(), now
                store.insert(work, schedule_id, self.namespace, name, document, now)
            else:
                schedule_id, decided_to = row.id, self._write_due_fires(work, row, now)
                if schedule.trigger != _schedule_of(row).trigger:
                    decided_to = max(now, decided_to)
                store.replace(work, schedule_id, document)
            self._move_cursor(work, Timetable(schedule, str(schedule_id)), decided_to)
        _log.info("schedule_stored", schedule=name, schedule_id=str(schedule_id))
        return self.get(name), row is None

    def get(self, name: str) -> ScheduleView:
        """Return a schedule. Raises NotFound with the names of the existing schedules."""
        with begin(self.database, self.runs.lock_wait) as work:
            row = store.view(work, self.namespace, name)
            if row is None:
                raise self._not_found(work, name)
        return _view(row)

    def all(self, namespace: str | None = None) -> list[ScheduleView]:
        """Return the schedules of a namespace, or all, by name."""
        with begin(self.database, self.runs.lock_wait) as work:
            return [_view(row) for row in store.views(work, namespace)]

    def fires(
        self, name: str, *, limit: int, before: UUID | None = None, states: Sequence[str] | None = None
    ) -> FirePage:
        """
        Return at most `limit` fires in one of `states`, the latest first, starting before the fire `before`.

        Raises NotFound.
        """
        schedule_id = self.get(name).row.id
        with begin(self.database, self.runs.lock_wait) as work:
            rows = store.fires(work, schedule_id, limit=limit + 1, before=before, states=states)
        more = len(rows) > limit
        return FirePage(rows[:limit], rows[limit - 1].id if more else None)

    def preview(self, name: str, count: int, after: datetime | None = None) -> list[Fire]:
        """
        Return the next fires after an instant, in the schedule's time zone. Raises NotFound.

        The default instant is that up to which all fires are decided.
        """
        view = self.get(name)
        return _upcoming(view.row, view.schedule, after or view.row.decided_to, count)

    def delete(self, name: str) -> None:
        """Delete a schedule and the history of its fires; its runs continue. Raises NotFound."""
        with begin(self.database, self.runs.lock_wait) as work:
            if not store.delete(work, self.namespace, name):
                raise self._not_found(work, name)
        _log.info("schedule_deleted", schedule=name)

    def pause(self, name: str, reason: str | None = None) -> ScheduleView:
        """Pause a schedule; waiting fires are skipped, active runs continue. Raises NotFound."""
        with begin(self.database, self.runs.lock_wait) as work:
            row = self._lock(work, name)
            if row.paused_at is None:
                self._move_cursor(work, _timetable(row), self._write_due_fires(work, row, store.now(work)))
                for fire in store.open_fires(work, row.id):
                    store.decide(work, fire.id, FireState.WAITING, FireState.SKIPPED, reason=_PAUSED)
                store.pause(work, row.id, reason)
                _log.info("schedule_paused", schedule=name)
        return self.get(name)

    def resume(self, name: str) -> ScheduleView:
        """Resume a schedule; fires that became due during the pause are skipped. Raises NotFound."""
        with begin(self.database, self.runs.lock_wait) as work:
            row = self._lock(work, name)
            if row.paused_at is not None:
                missed = timetable.all_missed(_timetable(row), row.decided_to, store.now(work), _PAUSED)
                if missed is not None:
                    store.insert_fires(work, [_fire_values(row.id, missed.first, FireState.SKIPPED, missed)])
                store.resume(work, row.id)
                self._move_cursor(work, _timetable(row), missed.last if missed else row.decided_to)
                _log.info("schedule_resumed", schedule=name)
        return self.get(name)

    def trigger(self, name: str, *, force: bool = False, key: str | None = None) -> Any:
        """
        Fire now, even while the schedule is paused; return the row of the fire with its state.

        The `overlap` policy applies unless `force` is set. The same key returns the same fire, as long as the history
        contains it. Raises NotFound.
        """
        with begin(self.database, self.runs.lock_wait) as work:
            row = self._lock(work, name)
            now = store.now(work)
            fire_id = ids.new_id() if key is None else uuid5(row.id, key)
            state = FireState.STARTING if force else FireState.WAITING
            values = _fire_values(row.id, Fire(now, now), state, None)
            store.insert_fires(work, [values | {"id": fire_id, "by_hand": True}])
            follow_up = self._decide_waiting(work, row)
        self._execute(row, follow_up)
        with begin(self.database, self.runs.lock_wait) as work:
            return store.fires(work, row.id, limit=1, fire_id=fire_id)[0]

    def ready(self, limit: int = BATCH) -> list[UUID]:
        """Return the ids of schedules that need a decision."""
        with begin(self.database, self.runs.lock_wait) as work:
            return store.ready(work, limit)

    def advance_all(self) -> int:
        """
        Decide about the due fires of all schedules and submit their runs; return the number of submitted runs.

        Rows that another transaction has locked are left for the next pass. A schedule that raises an error is paused
        with the reason. Raises Unavailable.
        """
        bounded = replace(self, runs=replace(self.runs, lock_wait=_LOCK_WAIT))
        done = 0
        for schedule_id in self.ready():
            try:
                done += bounded.advance(schedule_id)
            except RowsLocked:
                continue
            except Unavailable:
                raise
            except Exception as error:  # noqa: BLE001 one schedule must not stop the others
                _log.exception("schedule_raised", schedule_id=str(schedule_id))
                bounded.suspend(schedule_id, reason_of(error, "deciding what is due"))
        return done

    def suspend(self, schedule_id: UUID, reason: str) -> None:
        """Pause a schedule that raised an error, without reading its document; its undecided fires fail."""
        with begin(self.database, self.runs.lock_wait) as work:
            if store.lock_if_free(work, schedule_id) is None:
                return
            for fire in store.open_fires(work, schedule_id):
                if fire.state in (FireState.WAITING, FireState.STARTING):
                    store.decide(work, fire.id, FireState(fire.state), FireState.FAILED, reason=reason)
            store.pause(work, schedule_id, reason)

    def advance(self, schedule_id: UUID) -> int:
        """
        Decide about the due fires of a schedule and submit their runs; return the number of submitted runs.

        Concurrent calls are safe: a call returns 0 when another transaction has locked the schedule.
        """
        with begin(self.database, self.runs.lock_wait) as work:
            row = store.lock_if_free(work, schedule_id)
            if row is None:
                return 0
            self._move_cursor(work, _timetable(row), self._write_due_fires(work, row, store.now(work)))
            store.prune(work, row.id, self.keep)
            follow_up = self._decide_waiting(work, row)
        return self._execute(row, follow_up)

    def _write_due_fires(self, work: UnitOfWork, row: Any, now: datetime) -> datetime:
        """Write the due and the missed fires; return the instant up to which all are decided."""
        decided_to: datetime = row.decided_to
        if row.paused_at is not None:
            return decided_to
        due = timetable.due(_timetable(row), decided_to, now)
        missed = [_fire_values(row.id, gap.first, FireState.MISSED, gap) for gap in due.missed]
        fires = [_fire_values(row.id, fire, FireState.WAITING, None) for fire in due.fires]
        store.insert_fires(work, [*missed, *fires])
        for gap in due.missed:
            _log.warning(
                "schedule_fires_missed",
                schedule=row.name,
                count=gap.count,
                first=gap.first.at.isoformat(),
                reason=gap.reason,
            )
        return due.last

    def _move_cursor(self, work: UnitOfWork, table: Timetable, decided_to: datetime) -> None:
        next_fire = next(iter(timetable.upcoming(table, decided_to, 1)), None)
        store.move_cursor(work, UUID(table.salt), decided_to, next_fire.due_at if next_fire else None)

    def _decide_waiting(self, work: UnitOfWork, row: Any) -> _FollowUp:
        """Decide about the waiting fires; those that start get the state `starting`."""
        store.close_ended(work, row.id)
        opened = store.open_fires(work, row.id)
        waiting = [fire for fire in opened if fire.state == FireState.WAITING]
        begun = [fire for fire in opened if fire.state != FireState.WAITING]
        active = [ActiveFire(fire.at, str(fire.run_id) if fire.run_id else None) for fire in begun]
        decision = decide_overlap(_schedule_of(row).overlap, [fire.at for fire in waiting], active)
        for place, reason in decision.skip:
            store.decide(work, waiting[place].id, FireState.WAITING, FireState.SKIPPED, reason=reason)
        for place in decision.start:
            store.decide(work, waiting[place].id, FireState.WAITING, FireState.STARTING)
        start = [fire for fire in begun if fire.state == FireState.STARTING]
        start += [waiting[place] for place in decision.start]
        cancel = [fire.run_id for fire in begun if fire.run_id and fire.run_state not in _ENDING]
        return _FollowUp(start, cancel if decision.cancel else [])

    def _execute(self, row: Any, follow_up: _FollowUp) -> int:
        for run_id in follow_up.cancel:
            try:
                self.runs.cancel(run_id, message=f"a later fire of the schedule {row.name} replaced it")
            except NotFound:
                _log.info("run_to_cancel_not_found", schedule=row.name, run_id=str(run_id))
        return sum(self._start(row, fire) for fire in follow_up.start)

    def _start(self, row: Any, fire: Any) -> bool:
        """Submit the run of a fire. When that is not possible, the fire fails with the reason."""
        try:
            run_id = self._submit(_schedule_of(row), row, fire)
        except Unavailable:
            raise
        except ArrieroError as error:
            return self._mark_failed(row, fire, shortened(str(error)))
        except Exception as error:  # noqa: BLE001 otherwise each pass would submit it again
            _log.exception("schedule_fire_raised", schedule=row.name, at=fire.at.isoformat())
            return self._mark_failed(row, fire, reason_of(error, "submitting its run"))
        with begin(self.database, self.runs.lock_wait) as work:
            fired = store.decide(work, fire.id, FireState.STARTING, FireState.FIRED, run_id=run_id)
        if fired:
            _log.info("schedule_fired", schedule=row.name, at=fire.at.isoformat(), run_id=str(run_id))
        return fired

    def _mark_failed(self, row: Any, fire: Any, reason: str) -> bool:
        with begin(self.database, self.runs.lock_wait) as work:
            store.decide(work, fire.id, FireState.STARTING, FireState.FAILED, reason=reason)
        _log.warning("schedule_fire_failed", schedule=row.name, at=fire.at.isoformat(), error=reason)
        return False

    def _submit(self, schedule: Schedule, row: Any, fire: Any) -> UUID:
        found = registry.get(self.database, schedule.workflow, schedule.version, namespace=row.namespace)
        submission = Submission(
            found.definition,
            inputs.render(schedule, fire.at),
            version=found.version,
            newest=schedule.version is None,
            priority=schedule.priority,
            idempotency_key=_key(row.id, fire),
            labels=schedule.labels,
            namespace=row.namespace,
        )
        try:
            return self.runs.submit(submission).id
        except IdempotencyKeyReused as error:
            # An earlier scheduler submitted the run and died before it stored that; the workflow or the schedule has
            # changed since.
            return UUID(error.run_id)

    def _problems(self, schedule: Schedule, now: datetime) -> Iterator[Problem]:
        try:
            found = registry.get(self.database, schedule.workflow, schedule.version, namespace=self.namespace)
            run_inputs.resolve(found.definition, inputs.render(schedule, now))
        except NotFound as error:
            where = "workflow" if error.kind == "workflow" else "version"
            yield Problem(where, f"there is {error.args[0].partition(';')[0]}", check.nearest(error.name, error.known))
        except InvalidInput as error:
            yield from error.problems

    def _lock(self, work: UnitOfWork, name: str) -> Any:
        row = store.lock(work, self.namespace, name)
        if row is None:
            raise self._not_found(work, name)
        return row

    def _not_found(self, work: UnitOfWork, name: str) -> NotFound:
        return NotFound("schedule", name, store.names(work, self.namespace))


def _view(row: Any) -> ScheduleView:
    schedule = _schedule_of(row)
    next_fires = [] if row.paused_at is not None else _upcoming(row, schedule, row.decided_to, 1)
    return ScheduleView(row, schedule, next_fires[0] if next_fires else None)


def _upcoming(row: Any, schedule: Schedule, after: datetime, count: int) -> list[Fire]:
    """Return the next fires, in the time zone of the schedule."""
    found = timetable.upcoming(Timetable(schedule, str(row.id)), after, count)
    return [Fire(fire.at.astimezone(schedule.zone), fire.due_at.astimezone(schedule.zone)) for fire in found]


def _schedule_of(row: Any) -> Schedule:
    return Schedule.model_validate(row.document)


def _timetable(row: Any) -> Timetable:
    return Timetable(_schedule_of(row), str(row.id))


def _key(schedule_id: UUID, fire: Any) -> str:
    """Return the idempotency key of the run of a fire."""
    at = fire.at.astimezone(UTC).isoformat()
    return f"schedule/{schedule_id}/{at}{'/by-hand' if fire.by_hand else ''}"


def _fire_values(schedule_id: UUID, fire: Fire, state: FireState, gap: Missed | None) -> dict[str, Any]:
    return {
        "id": ids.new_id(),
        "schedule_id": schedule_id,
        "at": fire.at,
        "by_hand": False,
        "due_at": fire.due_at,
        "last_at": gap.last if gap else None,
        "count": gap.count if gap else 1,
        "state": state,
        "open": state in {FireState.WAITING, FireState.STARTING},
        "reason": gap.reason if gap else None,
    }
