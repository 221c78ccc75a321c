"""
The sweep: expires leases, ends delays and timeouts, and repeats lost effects and lost messages.

Any number of sweeps may run at once: they select different rows, each in a transaction of its own, and wait for none
that another transaction has locked. A row that raises stops no other: its run is abandoned, with the reason.
The cost of a sweep is bounded by its batch, however many rows wait or are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from uuid import UUID

from app.kernel import log
from app.kernel.errors import BrokerUnreachable, NotFound, RowsLocked, Unavailable
from app.workflows.runs import admission
from app.workflows.runs.changes.cancellation import CALLER_STOPPED, cancel_run
from app.workflows.runs.changes.transactions import RunTransaction
from app.workflows.runs.messages import StepMessage
from app.workflows.runs.recovery import expiry, overdue
from app.workflows.runs.recovery.abandon import abandon, reason_of
from app.workflows.runs.recovery.overdue import Overdue, OverdueKind, SweepCursor
from app.workflows.runs.service import Runs
from app.workflows.state_machine.states import RunState

_log = log.get(__name__)

#: Rows of one kind in one sweep; the next sweep continues.
BATCH = 500
#: Open rows of a page in which a sweep searches for lost effects.
_PAGE = 100
#: The effects of the end of a run are carried out by the process that ended it; after this time, they were lost.
_EFFECTS_LOST_AFTER = timedelta(seconds=2)
#: How long a transaction of a sweep waits for rows that another has locked.
_LOCK_WAIT = timedelta(milliseconds=100)
#: A row that is overdue for so long is waited for, one of each kind in a sweep. In a run that others lock without a
#: gap, it would be skipped for as long as they do.
_PATIENCE = timedelta(seconds=5)
#: Lost messages are not searched in a queue with more messages: its workers are busy, and counting is expensive.
_LONG_QUEUE = 2_000

#: Whether there is time for another row.
InTime = Callable[[], bool]
#: What is done about a row, in the transaction that has locked its run; returns whether anything was.
Act = Callable[[RunTransaction, Overdue], bool]


@dataclass(frozen=True, slots=True)
class Swept:
    """The results of a sweep."""

    #: Leases that were expired.
    lost: int
    #: Delays and waits that were over.
    resumed: int
    republished: int
    #: Steps and runs whose time was over.
    out_of_time: int = 0
    #: Lost effects that were carried out.
    repeated: int = 0
    #: Runs that were abandoned, because handling them raised.
    abandoned: int = 0


def sweep(
    runs: Runs,
    *,
    republish_after: timedelta,
    batch: int = BATCH,
    cursor: SweepCursor | None = None,
    in_time: InTime = lambda: True,
) -> Swept:
    """
    One sweep. `cursor` is where the last sweep of this process ended.

    Raises DatabaseUnreachable.
    """
    one = _Sweep(replace(runs, lock_wait=_LOCK_WAIT), batch, cursor or SweepCursor(), in_time)
    one.find_kinds()
    lost = one.each(overdue.EXPIRED, _expire_lease)
    resumed = one.each(overdue.DUE, _end_delay)
    late = one.each(overdue.TIMED_OUT_STEPS, _time_out) + one.each(overdue.PAST_DEADLINE, _end_run)
    repeated = one.repeat_effects()
    republished = one.guarded("republish", lambda: _republish(one.runs, republish_after, batch))
    return Swept(lost, resumed, republished, late, repeated, one.abandoned)


def _expire_lease(transaction: RunTransaction, step: Overdue) -> bool:
    return expiry.expire_lease(transaction, step.run_id, step.key, step.attempt)


def _end_delay(transaction: RunTransaction, step: Overdue) -> bool:
    return expiry.end_delay(transaction, step.run_id, step.key, step.attempt)


def _time_out(transaction: RunTransaction, step: Overdue) -> bool:
    return expiry.time_out(transaction, step.run_id, step.key)


def _end_run(transaction: RunTransaction, run: Overdue) -> bool:
    cancel_run(transaction, run.id, "its deadline has passed", RunState.FAILED)
    return True


def _cancel_called(runs: Runs, run_id: UUID) -> bool:
    runs.cancel(run_id, message=CALLER_STOPPED)
    return True


class _Sweep:
    """A running sweep."""

    def __init__(self, runs: Runs, batch: int, cursor: SweepCursor, in_time: InTime) -> None:
        self.runs, self.batch, self.cursor, self.in_time = runs, batch, cursor, in_time
        self.abandoned = 0
        #: Kinds that have overdue rows.
        self._found: set[str] = set()
        #: Consecutive rows at which the database could not be reached.
        self._unreachable = 0

    def find_kinds(self) -> None:
        """Find the kinds that have overdue rows: mostly none."""
        with self.runs.transaction() as transaction:
            kinds = (kind for kind in overdue.KINDS if kind.oldest(transaction.work, timedelta(0)) is not None)
            self._found = {kind.name for kind in kinds}

    def each(self, kind: OverdueKind, act: Act) -> int:
        """Act on overdue rows until there is none, the batch is full, or the time is over; returns on how many."""
        return self.guarded(kind.name, lambda: self._each(kind, act)) if kind.name in self._found else 0

    def repeat_effects(self) -> int:
        """Carry out lost effects of the ends of runs; returns how many."""
        page = min(self.batch, _PAGE)
        with self.runs.transaction() as transaction:
            work = transaction.work
            unanswered = overdue.unanswered(work, overdue.delegated(work, self.cursor, page), _EFFECTS_LOST_AFTER)
            unstopped = overdue.unstopped(work, overdue.called(work, self.cursor, page))
            keys = overdue.admissible_keys(work, self.cursor, page)
        done = 0
        for row in unanswered:
            done += self._one(row.run_id, "answering", partial(self.runs.answer, row.id))
        for row in unstopped:
            done += self._one(row.run_id, "cancelling", partial(_cancel_called, self.runs, row.id))
        return done + sum(self._admit(key) for key in keys)

    def guarded(self, name: str, part: Callable[[], int]) -> int:
        """One part of the sweep. Its errors stop no other part, unless the database cannot be reached."""
        try:
            return part()
        except RowsLocked:
            return 0
        except Unavailable:
            raise
        except Exception:  # noqa: BLE001 one part must not stop the others
            _log.exception("sweep_part_failed", part=name)
            return 0

    def _each(self, kind: OverdueKind, act: Act) -> int:
        done = 0
        passed: set[UUID] = set()
        while len(passed) < self.batch and done < self.batch and self.in_time():
            row: Overdue | None = None
            try:
                with self.runs.transaction() as transaction:
                    row = kind.next(transaction.work, passed)
                    acted = row is not None and act(transaction, row)
                if row is None:
                    break
                done += acted
                if not acted:
                    passed.add(row.id)
                self._unreachable = 0
            except Unavailable as error:
                if row is None:
                    raise
                self._count_unreachable(error)
                passed.add(row.id)
            except Exception as error:
                if row is None:
                    raise
                passed.add(row.id)
                self._abandon(row.run_id, kind.name, error)
        return done + self._oldest(kind, act)

    def _oldest(self, kind: OverdueKind, act: Act) -> int:
        with self.runs.transaction() as transaction:
            row = kind.oldest(transaction.work, _PATIENCE)
        if row is None:
            return 0

        def one() -> bool:
            with self.runs.transaction() as transaction:
                return act(transaction, row)

        return self._one(row.run_id, kind.name, one)

    def _admit(self, key: str) -> int:
        """Begin runs of a key. A run that raises is abandoned, and the next sweep continues."""
        try:
            return self.runs.admit(key)
        except RowsLocked:
            return 0
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 one row must not stop the others
            with self.runs.transaction() as transaction:
                run_id = admission.next_admissible(transaction.work, key)
            if run_id is not None:
                self._abandon(run_id, "admitting", error)
            return 0

    def _one(self, run_id: UUID, doing: str, act: Callable[[], bool]) -> int:
        try:
            done = int(act())
        except NotFound:
            return 0
        except Unavailable as error:
            self._count_unreachable(error)
            return 0
        except Exception as error:  # noqa: BLE001 one row must not stop the others
            self._abandon(run_id, doing, error)
            return 0
        self._unreachable = 0
        return done

    def _count_unreachable(self, error: Unavailable) -> None:
        """A row that ends its connection, or is locked, is skipped. Raises `error` for the second lost connection."""
        self._unreachable += not isinstance(error, RowsLocked)
        if self._unreachable > 1:
            raise error

    def _abandon(self, run_id: UUID, doing: str, error: Exception) -> None:
        _log.error("sweep_row_failed", run_id=str(run_id), doing=doing, exc_info=error)
        try:
            abandon(self.runs, run_id, reason_of(error, doing))
            self.abandoned += 1
        except NotFound:
            pass
        except Unavailable as unavailable:
            self._count_unreachable(unavailable)
        except Exception:  # noqa: BLE001 the next sweep tries again; the other rows follow
            _log.exception("run_not_abandoned", run_id=str(run_id))


def _republish(runs: Runs, age: timedelta, batch: int) -> int:
    """
    Send again the messages of ready steps that have none.

    A queue with at least as many messages as steps that were sent before `age` has lost none of them. A queue with
    fewer has lost some. Which ones is not known, so the oldest are sent again; a duplicate message is refused at the
    claim. A long queue is left until it is shorter.
    """
    with runs.transaction() as transaction:
        work = transaction.work
        queues = [queue for queue in overdue.ready_queues(work) if overdue.stale(work, queue, age, 1)]
    sent, unreachable = 0, 0
    for queue in queues:
        try:
            depth = runs.publisher.depth(queue)
        except BrokerUnreachable as error:
            # One queue that cannot be read stops no other; a broker that cannot be reached does.
            _log.warning("republish_postponed", queue=queue, error=str(error))
            unreachable += 1
            if unreachable > 1:
                return sent
            continue
        if depth >= _LONG_QUEUE:
            continue
        with runs.transaction() as transaction:
            work = transaction.work
            missing = overdue.stale(work, queue, age, depth + batch) - depth
            rows = overdue.touch_stale(work, queue, age, missing) if missing > 0 else []
            ready = [row for row in rows if not row.paused]
            transaction.effects.extend(StepMessage.of(row, row.workflow) for row in ready)
        sent += len(ready)
        if ready:
            _log.warning("steps_republished", queue=queue, steps=len(ready))
    return sent
