"""
The sweep: what brings lost work back, and what lets time pass.

It ends leases that ran out, sends steps whose delay is over, ends waits, steps and runs whose time is over, makes up
for what should have followed the end of a run, and sends messages again that nobody can find.
Any number of sweeps may run at once: each change is guarded by the state that it replaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from app.kernel import log
from app.kernel.errors import BrokerUnreachable
from app.workflows import messages, store
from app.workflows.messages import send_after_commit
from app.workflows.service import Runs
from app.workflows.states import RunState

_log = log.get(__name__)

#: Steps of one kind in one sweep; the next one goes on.
BATCH = 500
#: What follows the end of a run is done by who ended it; older than this, it was lost.
_AFTERMATH = timedelta(seconds=2)


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


def sweep(runs: Runs, *, republish_after: timedelta, batch: int = BATCH) -> Swept:
    """One sweep."""
    with runs.database.work() as work:
        expired, due = store.expired(work, batch), store.due(work, batch)
        late_steps, late_runs = store.out_of_time(work, batch), store.past_deadline(work, batch)
        unanswered, unstopped = store.unanswered(work, _AFTERMATH, batch), store.unstopped(work, batch)
        blocked = store.blocked_keys(work, batch)
    lost = sum(runs.lose(row.run_id, row.key, row.attempt) for row in expired)
    resumed = sum(runs.resume(row.run_id, row.key, row.attempt) for row in due)
    late = sum(runs.run_out(row.run_id, row.key) for row in late_steps)
    for row in late_runs:
        runs.cancel(row.id, why="its deadline has passed", ending=RunState.FAILED)
    made_up = sum(runs.answer(row.id) for row in unanswered)
    for row in unstopped:
        runs.stop_called(row.id)
    made_up += sum(runs.admit(key) for key in blocked)
    return Swept(
        lost,
        resumed,
        _republish(runs, republish_after, batch),
        late + len(late_runs),
        made_up + len(unstopped),
    )


def _republish(runs: Runs, age: timedelta, batch: int) -> int:
    """
    Send again what is ready and has no message.

    A queue that holds at least as many messages as steps that were sent before `age` has lost none of them. One that
    holds fewer has lost some; which, nobody can tell, so the oldest are sent again, and a message too many dies at
    the claim.
    """
    with runs.database.work() as work:
        queues = store.stale_queues(work, age)
    sent = 0
    for queue, steps in ((row.queue, row.steps) for row in queues):
        try:
            missing = steps - runs.publisher.depth(queue)
        except BrokerUnreachable as error:
            _log.warning("republish_postponed", queue=queue, steps=steps, error=str(error))
            return sent
        if missing <= 0:
            continue
        with runs.database.work() as work:
            rows = store.touch_stale(work, queue, age, min(missing, batch))
            for row in rows:
                send_after_commit(work, runs.publisher, messages.of(row, row.workflow))
        sent += len(rows)
        _log.warning("steps_republished", queue=queue, steps=len(rows))
    return sent
