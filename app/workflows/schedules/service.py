"""
What can be done with schedules: put, look at, pause, resume, trigger, delete; and fire what is due.

The database is the truth: a fire is a row, one for each instant, written while the schedule is locked. Its run is
submitted after that, under an idempotency key that follows from the instant, and so by whoever comes first: however
many look after schedules, and wherever one of them dies, an instant has one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

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
from app.workflows.schedules.overlap import FireState, Going, settle
from app.workflows.schedules.schedule import Schedule
from app.workflows.schedules.timetable import Fire, Missed, Timetable
from app.workflows.state_machine.states import FINAL_RUNS, RunState

_log = log.get(__name__)

#: Schedules in one look; the next one goes on.
BATCH = 500
#: How long a look waits for rows that another transaction has locked.
_LOCK_WAIT = timedelta(milliseconds=100)

_PAUSED = "the schedule was paused"

#: States of a run that comes to its end by itself.
_ENDING = FINAL_RUNS | {RunState.CANCELLING, RunState.COMPENSATING}


@dataclass(frozen=True, slots=True)
class View:
    """A schedule as it stands: its row with its last fire and its last run, and what comes next."""

    row: Any
    schedule: Schedule
    #: In its time zone; None while it is paused, and after its end.
    next: Fire | None

    @property
    def state(self) -> str:
        """`active`, `paused` or `ended`."""
        if self.row.paused_at is not None:
            return "paused"
        return "active" if self.next is not None else "ended"


@dataclass(frozen=True, slots=True)
class FirePage:
    """Some fires as rows, and the cursor of the next page when there is one."""

    fires: Sequence[Any]
    next_cursor: UUID | None


@dataclass(frozen=True, slots=True)
class _Begun:
    """What follows the commit of a decision."""

    #: Rows of fires whose run is to be submitted.
    start: Sequence[Any]
    #: Runs to be cancelled.
    cancel: Sequence[UUID]


@dataclass(frozen=True, slots=True)
class Schedules:
    """The use cases. The fields are what they stand on."""

    runs: Runs
    #: Setting schedules.keep_fires.
    keep: timedelta

    @property
    def database(self) -> Database:
        """Where everything is written."""
        return self.runs.database

    def put(self, schedule: Schedule) -> tuple[View, bool]:
        """
        Store a schedule under its name; False when it replaced another.

        Nothing fires for instants before it. What was due before a change is decided as the schedule was before.

        Raises InvalidInput when its workflow is not there or does not take its inputs.
        """
        with begin(self.database, self.runs.lock_wait) as work:
            now = store.now(work)
        if problems := list(self._problems(schedule, now)):
            raise InvalidInput(problems, check.WHAT)
        name, document = schedule.schedule, as_json(schedule.document())
        with begin(self.database, self.runs.lock_wait) as work:
            store.lock_name(work, name)
            row, now = store.lock(work, name), store.now(work)
            if row is None:
                schedule_id, decided_to = ids.new_id(), now
                store.insert(work, schedule_id, name, document, now)
            else:
                schedule_id, decided_to = row.id, self._come_due(work, row, now)
                if schedule.trigger != _stored(row).trigger:
                    decided_to = max(now, decided_to)
                store.replace(work, schedule_id, document)
            self._move(work, Timetable(schedule, str(schedule_id)), decided_to)
        _log.info("schedule_stored", schedule=name, schedule_id=str(schedule_id))
        return self.get(name), row is None

    def get(self, name: str) -> View:
        """One schedule. Raises NotFound, naming those that there are."""
        with begin(self.database, self.runs.lock_wait) as work:
            row = store.view(work, name)
            if row is None:
                raise _unknown(work, name)
        return _view(row)

    def all(self) -> list[View]:
        """Every schedule, by name."""
        with begin(self.database, self.runs.lock_wait) as work:
            return [_view(row) for row in store.views(work)]

    def fires(
        self, name: str, *, limit: int, before: UUID | None = None, states: Sequence[str] | None = None
    ) -> FirePage:
        """At most `limit` fires before the fire `before`, in one of `states`, the latest first. Raises NotFound."""
        schedule_id = self.get(name).row.id
        with begin(self.database, self.runs.lock_wait) as work:
            rows = store.fires(work, schedule_id, limit=limit + 1, before=before, states=states)
        more = len(rows) > limit
        return FirePage(rows[:limit], rows[limit - 1].id if more else None)

    def preview(self, name: str, count: int, after: datetime | None = None) -> list[Fire]:
        """The next fires after an instant, or after those that are decided, in its time zone. Raises NotFound."""
        view = self.get(name)
        return _upcoming(view.row, view.schedule, after or view.row.decided_to, count)

    def delete(self, name: str) -> None:
        """Remove a schedule and the history of its fires; its runs stay, and go on. Raises NotFound."""
        with begin(self.database, self.runs.lock_wait) as work:
            if not store.delete(work, name):
                raise _unknown(work, name)
        _log.info("schedule_deleted", schedule=name)

    def pause(self, name: str, reason: str | None = None) -> View:
        """Let it fire no more; fires that wait are dropped, runs go on. Raises NotFound."""
        with begin(self.database, self.runs.lock_wait) as work:
            row = self._lock(work, name)
            if row.paused_at is None:
                self._move(work, _timetable(row), self._come_due(work, row, store.now(work)))
                for fire in store.open_fires(work, row.id):
                    store.decide(work, fire.id, FireState.WAITING, FireState.SKIPPED, reason=_PAUSED)
                store.pause(work, row.id, reason)
                _log.info("schedule_paused", schedule=name)
        return self.get(name)

    def resume(self, name: str) -> View:
        """Let it fire again; what came due meanwhile is skipped. Raises NotFound."""
        with begin(self.database, self.runs.lock_wait) as work:
            row = self._lock(work, name)
            if row.paused_at is not None:
                passed = timetable.passed(_timetable(row), row.decided_to, store.now(work), _PAUSED)
                if passed is not None:
                    store.insert_fires(work, [_values(row.id, passed.first, FireState.SKIPPED, passed)])
                store.resume(work, row.id)
                self._move(work, _timetable(row), passed.last if passed else row.decided_to)
                _log.info("schedule_resumed", schedule=name)
        return self.get(name)

    def trigger(self, name: str, *, force: bool = False, key: str | None = None) -> Any:
        """
        Fire now, also while it is paused; gives the row of the fire, which tells what became of it.

        What it does beside an earlier run is for its `overlap` to say, unless it is forced to begin. The same key gives
        the fire that it gave before, as long as the history has it. Raises NotFound.
        """
        with begin(self.database, self.runs.lock_wait) as work:
            row = self._lock(work, name)
            now = store.now(work)
            fire_id = ids.new_id() if key is None else uuid5(row.id, key)
            state = FireState.STARTING if force else FireState.WAITING
            values = _values(row.id, Fire(now, now), state, None)
            store.insert_fires(work, [values | {"id": fire_id, "by_hand": True}])
            begun = self._settle(work, row)
        self._follow(row, begun)
        with begin(self.database, self.runs.lock_wait) as work:
            return store.fires(work, row.id, limit=1, fire_id=fire_id)[0]

    def ready(self, limit: int = BATCH) -> list[UUID]:
        """Schedules about which there is something to decide."""
        with begin(self.database, self.runs.lock_wait) as work:
            return store.ready(work, limit)

    def advance_all(self) -> int:
        """
        Decide what is due of all schedules, and submit their runs; gives how many. Rows that another transaction has
        locked are left for the next look. A schedule that raises is paused, with the reason.

        Raises Unavailable.
        """
        hasty = replace(self, runs=replace(self.runs, lock_wait=_LOCK_WAIT))
        done = 0
        for schedule_id in self.ready():
            try:
                done += hasty.advance(schedule_id)
            except RowsLocked:
                continue
            except Unavailable:
                raise
            except Exception as error:  # noqa: BLE001 the shell of one schedule
                _log.exception("schedule_broke", schedule_id=str(schedule_id))
                hasty.suspend(schedule_id, reason_of(error, "deciding what is due"))
        return done

    def suspend(self, schedule_id: UUID, reason: str) -> None:
        """Pause a schedule that raises, without reading its document; its fires that are open have failed."""
        with begin(self.database, self.runs.lock_wait) as work:
            if store.lock_if_free(work, schedule_id) is None:
                return
            for fire in store.open_fires(work, schedule_id):
                if fire.state in (FireState.WAITING, FireState.STARTING):
                    store.decide(work, fire.id, FireState(fire.state), FireState.FAILED, reason=reason)
            store.pause(work, schedule_id, reason)

    def advance(self, schedule_id: UUID) -> int:
        """
        Decide what is due of a schedule, and submit its runs; gives how many.

        Any number may do this at once: who finds the schedule locked leaves it to the other.
        """
        with begin(self.database, self.runs.lock_wait) as work:
            row = store.lock_if_free(work, schedule_id)
            if row is None:
                return 0
            self._move(work, _timetable(row), self._come_due(work, row, store.now(work)))
            store.prune(work, row.id, self.keep)
            begun = self._settle(work, row)
        return self._follow(row, begun)

    def _come_due(self, work: UnitOfWork, row: Any, now: datetime) -> datetime:
        """Write the fires that are due, and those that are missed; gives up to when all is decided."""
        decided_to: datetime = row.decided_to
        if row.paused_at is not None:
            return decided_to
        due = timetable.due(_timetable(row), decided_to, now)
        missed = [_values(row.id, gap.first, FireState.MISSED, gap) for gap in due.missed]
        fires = [_values(row.id, fire, FireState.WAITING, None) for fire in due.fires]
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

    def _move(self, work: UnitOfWork, table: Timetable, decided_to: datetime) -> None:
        following = next(iter(timetable.upcoming(table, decided_to, 1)), None)
        store.move(work, UUID(table.salt), decided_to, following.due_at if following else None)

    def _settle(self, work: UnitOfWork, row: Any) -> _Begun:
        """Decide about the fires that wait; those that begin are `starting` afterwards."""
        store.close_ended(work, row.id)
        opened = store.open_fires(work, row.id)
        waiting = [fire for fire in opened if fire.state == FireState.WAITING]
        begun = [fire for fire in opened if fire.state != FireState.WAITING]
        going = [Going(fire.at, str(fire.run_id) if fire.run_id else None) for fire in begun]
        settled = settle(_stored(row).overlap, [fire.at for fire in waiting], going)
        for place, reason in settled.skip:
            store.decide(work, waiting[place].id, FireState.WAITING, FireState.SKIPPED, reason=reason)
        for place in settled.begin:
            store.decide(work, waiting[place].id, FireState.WAITING, FireState.STARTING)
        start = [fire for fire in begun if fire.state == FireState.STARTING]
        start += [waiting[place] for place in settled.begin]
        cancel = [fire.run_id for fire in begun if fire.run_id and fire.run_state not in _ENDING]
        return _Begun(start, cancel if settled.cancel else [])

    def _follow(self, row: Any, begun: _Begun) -> int:
        for run_id in begun.cancel:
            try:
                self.runs.cancel(run_id, message=f"a later fire of the schedule {row.name} replaced it")
            except NotFound:
                _log.info("run_to_cancel_is_gone", schedule=row.name, run_id=str(run_id))
        return sum(self._start(row, fire) for fire in begun.start)

    def _start(self, row: Any, fire: Any) -> bool:
        """Submit the run of a fire. Where that cannot be done, the fire has failed, and says why."""
        try:
            run_id = self._submit(_stored(row), row.id, fire)
        except Unavailable:
            raise
        except ArrieroError as error:
            return self._failed(row, fire, shortened(str(error)))
        except Exception as error:  # noqa: BLE001 left alone, it would be submitted again for ever
            _log.exception("schedule_fire_broke", schedule=row.name, at=fire.at.isoformat())
            return self._failed(row, fire, reason_of(error, "submitting its run"))
        with begin(self.database, self.runs.lock_wait) as work:
            fired = store.decide(work, fire.id, FireState.STARTING, FireState.FIRED, run_id=run_id)
        if fired:
            _log.info("schedule_fired", schedule=row.name, at=fire.at.isoformat(), run_id=str(run_id))
        return fired

    def _failed(self, row: Any, fire: Any, reason: str) -> bool:
        with begin(self.database, self.runs.lock_wait) as work:
            store.decide(work, fire.id, FireState.STARTING, FireState.FAILED, reason=reason)
        _log.warning("schedule_fire_failed", schedule=row.name, at=fire.at.isoformat(), error=reason)
        return False

    def _submit(self, schedule: Schedule, schedule_id: UUID, fire: Any) -> UUID:
        found = registry.get(self.database, schedule.workflow, schedule.version)
        submission = Submission(
            found.definition,
            inputs.render(schedule, fire.at),
            version=found.version,
            newest=schedule.version is None,
            priority=schedule.priority,
            idempotency_key=_key(schedule_id, fire),
            labels=schedule.labels,
        )
        try:
            return self.runs.submit(submission).id
        except IdempotencyKeyReused as error:
            # Whoever submitted it died before it wrote that down, and the workflow or the schedule has changed since.
            return UUID(error.run_id)

    def _problems(self, schedule: Schedule, now: datetime) -> Iterator[Problem]:
        try:
            found = registry.get(self.database, schedule.workflow, schedule.version)
            run_inputs.resolve(found.definition, inputs.render(schedule, now))
        except NotFound as error:
            where = "workflow" if error.kind == "workflow" else "version"
            yield Problem(where, f"there is {error.args[0].partition(';')[0]}", check.nearest(error.name, error.known))
        except InvalidInput as error:
            yield from error.problems

    def _lock(self, work: UnitOfWork, name: str) -> Any:
        row = store.lock(work, name)
        if row is None:
            raise _unknown(work, name)
        return row


def _view(row: Any) -> View:
    schedule = _stored(row)
    following = [] if row.paused_at is not None else _upcoming(row, schedule, row.decided_to, 1)
    return View(row, schedule, following[0] if following else None)


def _upcoming(row: Any, schedule: Schedule, after: datetime, count: int) -> list[Fire]:
    """The next fires, in the time zone of the schedule."""
    found = timetable.upcoming(Timetable(schedule, str(row.id)), after, count)
    return [Fire(fire.at.astimezone(schedule.zone), fire.due_at.astimezone(schedule.zone)) for fire in found]


def _stored(row: Any) -> Schedule:
    return Schedule.model_validate(row.document)


def _timetable(row: Any) -> Timetable:
    return Timetable(_stored(row), str(row.id))


def _unknown(work: UnitOfWork, name: str) -> NotFound:
    return NotFound("schedule", name, store.names(work))


def _key(schedule_id: UUID, fire: Any) -> str:
    """The idempotency key of the run of a fire."""
    at = fire.at.astimezone(UTC).isoformat()
    return f"schedule/{schedule_id}/{at}{'/by-hand' if fire.by_hand else ''}"


def _values(schedule_id: UUID, fire: Fire, state: FireState, gap: Missed | None) -> dict[str, Any]:
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
