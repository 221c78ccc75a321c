"""
The sweep: what brings lost work back, and what lets time pass.

It ends leases that ran out, sends steps whose delay is over, ends waits, steps and runs whose time is over, makes up
for what should have followed the end of a run, and sends messages again that nobody can find.
Any number of sweeps may run at once: they take different rows, each in a transaction of its own, and wait for none that
another transaction has locked. A row that raises stops nobody: its run is abandoned, with the reason.
What a sweep costs is bounded by its batch, however much waits or is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from app.kernel import log
from app.kernel.database import UnitOfWork
from app.kernel.errors import BrokerUnreachable, NotFound, RowsLocked, Unavailable
from app.workflows.runs import messages, submission
from app.workflows.runs.messages import send_after_commit
from app.workflows.runs.recovery import overdue
from app.workflows.runs.recovery.abandon import abandon, reason_of
from app.workflows.runs.recovery.overdue import OverdueKind, Place
from app.workflows.runs.service import CALLER_STOPPED, Runs
from app.workflows.state_machine.states import RunState

_log = log.get(__name__)

#: Rows of one kind in one sweep; the next one goes on.
BATCH = 500
#: Rows that are open, of which one sweep looks whether something is lost.
_PAGE = 100
#: What follows the end of a run is done by who ended it; older than this, it was lost.
_AFTERMATH = timedelta(seconds=2)
#: How long a transaction of a sweep waits for rows that another has locked.
_LOCK_WAIT = timedelta(milliseconds=100)
#: A row that is overdue for so long is waited for, one of each kind in a sweep: in a run that others lock without a
#: gap, it would be passed over for as long as they do.
_PATIENCE = timedelta(seconds=5)
#: Messages in a queue from which on nobody looks for lost ones: it has enough to do, and counting costs more.
_LONG_QUEUE = 2_000

#: Whether there is time for another row.
InTime = Callable[[], bool]
#: What is done about a row, in the transaction that has locked its run; gives whether anything was.
Act = Callable[[Runs, UnitOfWork, Any], bool]


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found."""

    lost: int
    #: Delays and waits that were over.
    resumed: int
    republished: int
    #: Steps and runs whose time was over.
    out_of_time: int = 0
    #: What had not followed the end of a run.
    made_up: int = 0
    #: Runs that were abandoned, because handling them raised.
    abandoned: int = 0


def sweep(
    runs: Runs,
    *,
    republish_after: timedelta,
    batch: int = BATCH,
    place: Place | None = None,
    in_time: InTime = lambda: True,
) -> Swept:
    """
    One sweep. `place` is where the sweep of this process before it ended.

    Raises DatabaseUnreachable.
    """
    one = _Sweep(replace(runs, lock_wait=_LOCK_WAIT), batch, place or Place(), in_time)
    one.look()
    lost = one.each(overdue.EXPIRED, _lose)
    resumed = one.each(overdue.DUE, _resume)
    late = one.each(overdue.OUT_OF_TIME, _time_out) + one.each(overdue.PAST_DEADLINE, _end)
    made_up = one.make_up()
    republished = one.guarded("republish", lambda: _republish(one.runs, republish_after, batch))
    return Swept(lost, resumed, republished, late, made_up, one.abandoned)


def _lose(runs: Runs, work: UnitOfWork, row: Any) -> bool:
    return runs.expire_lease(row.run_id, row.key, row.attempt, work)


def _resume(runs: Runs, work: UnitOfWork, row: Any) -> bool:
    return runs.end_delay(row.run_id, row.key, row.attempt, work)


def _time_out(runs: Runs, work: UnitOfWork, row: Any) -> bool:
    return runs.time_out(row.run_id, row.key, work)


def _stop(runs: Runs, run_id: UUID) -> bool:
    runs.cancel(run_id, message=CALLER_STOPPED)
    return True


def _end(runs: Runs, work: UnitOfWork, row: Any) -> bool:
    runs.cancel(row.id, message="its deadline has passed", ending=RunState.FAILED, within=work)
    return True


class _Sweep:
    """A sweep under way."""

    def __init__(self, runs: Runs, batch: int, place: Place, in_time: InTime) -> None:
        self.runs, self.batch, self.place, self.in_time = runs, batch, place, in_time
        self.abandoned = 0
        #: Kinds of which there are overdue rows.
        self._found: set[str] = set()
        #: Rows in a row at which the database could not be reached.
        self._unreachable = 0

    def look(self) -> None:
        """See of which kinds there are overdue rows at all: mostly of none."""
        with self.runs.transaction() as work:
            self._found = {kind.name for kind in overdue.KINDS if kind.oldest(work, timedelta(0)) is not None}

    def each(self, kind: OverdueKind, act: Act) -> int:
        """Act on overdue rows until there is none, the batch is full, or the time is over; gives on how many."""
        return self.guarded(kind.name, lambda: self._each(kind, act)) if kind.name in self._found else 0

    def make_up(self) -> int:
        """Do what should have followed the end of a run; gives how much of it."""
        page = min(self.batch, _PAGE)
        with self.runs.transaction() as work:
            unanswered = overdue.unanswered(work, overdue.delegated(work, self.place, page), _AFTERMATH)
            unstopped = overdue.unstopped(work, overdue.called(work, self.place, page))
            keys = overdue.admissible_keys(work, self.place, page)
        done = 0
        for row in unanswered:
            done += self._one(row.run_id, "answering", partial(self.runs.answer, row.id))
        for row in unstopped:
            done += self._one(row.run_id, "cancelling", partial(_stop, self.runs, row.id))
        return done + sum(self._admit(key) for key in keys)

    def guarded(self, name: str, part: Callable[[], int]) -> int:
        """One part of the sweep. What it raises stops no other part, unless the database is away."""
        try:
            return part()
        except RowsLocked:
            return 0
        except Unavailable:
            raise
        except Exception:  # noqa: BLE001 the shell of one part
            _log.exception("sweep_part_broke", part=name)
            return 0

    def _each(self, kind: OverdueKind, act: Act) -> int:
        done = 0
        passed: set[UUID] = set()
        while len(passed) < self.batch and done < self.batch and self.in_time():
            row: Any = None
            try:
                with self.runs.transaction() as work:
                    row = kind.next(work, passed)
                    acted = row is not None and act(self.runs, work, row)
                if row is None:
                    break
                done += acted
                if not acted:
                    passed.add(row.id)
                self._unreachable = 0
            except Unavailable as error:
                if row is None:
                    raise
                self._pass_over(error)
                passed.add(row.id)
            except Exception as error:
                if row is None:
                    raise
                passed.add(row.id)
                self._broke(row.run_id, kind.name, error)
        return done + self._oldest(kind, act)

    def _oldest(self, kind: OverdueKind, act: Act) -> int:
        with self.runs.transaction() as work:
            row = kind.oldest(work, _PATIENCE)
        if row is None:
            return 0

        def one() -> bool:
            with self.runs.transaction() as work:
                return act(self.runs, work, row)

        return self._one(row.run_id, kind.name, one)

    def _admit(self, key: str) -> int:
        """Let runs of a key begin. The one that raises is abandoned, and the next sweep goes on."""
        try:
            return self.runs.admit(key)
        except RowsLocked:
            return 0
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 the shell of one row
            with self.runs.transaction() as work:
                run_id = submission.next_admissible(work, key)
            if run_id is not None:
                self._broke(run_id, "admitting", error)
            return 0

    def _one(self, run_id: UUID, doing: str, act: Callable[[], bool]) -> int:
        try:
            done = int(act())
        except NotFound:
            return 0
        except Unavailable as error:
            self._pass_over(error)
            return 0
        except Exception as error:  # noqa: BLE001 the shell of one row
            self._broke(run_id, doing, error)
            return 0
        self._unreachable = 0
        return done

    def _pass_over(self, error: Unavailable) -> None:
        """A row that ends its connection, or is locked, stops nobody; a database that is away ends the sweep."""
        self._unreachable += not isinstance(error, RowsLocked)
        if self._unreachable > 1:
            raise error

    def _broke(self, run_id: UUID, doing: str, error: Exception) -> None:
        _log.error("sweep_row_broke", run_id=str(run_id), doing=doing, exc_info=error)
        try:
            abandon(self.runs, run_id, reason_of(error, doing))
            self.abandoned += 1
        except NotFound:
            pass
        except Unavailable as unavailable:
            self._pass_over(unavailable)
        except Exception:  # noqa: BLE001 the next sweep tries again; the others go on
            _log.exception("run_not_abandoned", run_id=str(run_id))


def _republish(runs: Runs, age: timedelta, batch: int) -> int:
    """
    Send again what is ready and has no message.

    A queue that holds at least as many messages as steps that were sent before `age` has lost none of them. One that
    holds fewer has lost some; which, nobody can tell, so the oldest are sent again, and a message too many dies at
    the claim. A queue that is long is left until it is shorter.
    """
    with runs.transaction() as work:
        queues = [queue for queue in overdue.ready_queues(work) if overdue.stale(work, queue, age, 1)]
    sent, unreachable = 0, 0
    for queue in queues:
        try:
            depth = runs.publisher.depth(queue)
        except BrokerUnreachable as error:
            # One queue that cannot be read stops no other; a broker that is away does.
            _log.warning("republish_postponed", queue=queue, error=str(error))
            unreachable += 1
            if unreachable > 1:
                return sent
            continue
        if depth >= _LONG_QUEUE:
            continue
        with runs.transaction() as work:
            missing = overdue.stale(work, queue, age, depth + batch) - depth
            rows = overdue.touch_stale(work, queue, age, missing) if missing > 0 else []
            ready = [row for row in rows if not row.paused]
            for row in ready:
                send_after_commit(work, runs.publisher, messages.of(row, row.workflow))
        sent += len(ready)
        if ready:
            _log.warning("steps_republished", queue=queue, steps=len(ready))
    return sent
