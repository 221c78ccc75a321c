"""Passes of scheduled jobs on a real database: what is run, what is claimed, and what is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text

from app.governance.jobs import store
from app.governance.jobs.job import JobChange, PassOutcome, Trigger
from app.governance.jobs.registry import BY_NAME, JOBS
from app.governance.jobs.rows import ScheduledJobRow
from app.governance.jobs.service import ScheduledJobs
from app.kernel import ids
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, BrokerUnreachable, DatabaseUnreachable
from app.kernel.settings import Settings
from workers.governance import passes
from workers.governance.live_jobs import LiveJobs
from workers.governance.passes import JobPasses

SWEEP, EXPIRE = BY_NAME["sweep"], BY_NAME["expire"]


class Worker:
    """A control worker whose jobs are given."""

    def __init__(self, database: Database, name: str = "worker") -> None:
        self.database = database
        self.called: list[str] = []
        self.do: Callable[[], Mapping[str, object] | None] = lambda: None
        self.live = LiveJobs(Settings(), database, "redis://127.0.0.1:1")
        runtime: Any = SimpleNamespace(runs=SimpleNamespace(database=database), settings=Settings(), owner=name)
        self.passes = JobPasses(runtime, {job.task: self._run(job.name) for job in JOBS}, self.live)

    def _run(self, name: str) -> passes.JobFunction:
        def run(_: Any) -> Mapping[str, object] | None:
            self.called.append(name)
            return self.do()

        return run

    def change(self, name: str, change: JobChange) -> None:
        with self.database.work() as work:
            store.change(work, name, change.trigger)
            if change.is_paused:
                store.pause(work, name, "test")
        self.live._read()

    def row(self, name: str) -> ScheduledJobRow:
        with self.database.work() as work:
            found = store.find_row(work, name)
        assert found is not None
        return found


@pytest.fixture
def worker(database: Database) -> Worker:
    return Worker(database)


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_a_rare_job_runs_once_however_often_its_message_arrives(database: Database) -> None:
    """Two workers, and messages that were sent twice."""
    first, second = Worker(database, "first"), Worker(database, "second")
    for one in (first, second, first):
        one.passes.run(EXPIRE)
    assert first.called + second.called == ["expire"]
    assert first.row("expire").passes == 1


def test_a_cron_expression_is_one_pass_for_each_instant(database: Database) -> None:
    first, second = Worker(database, "first"), Worker(database, "second")
    first.change("sweep", JobChange(Trigger(None, "* * * * *")))
    second.live._read()
    for _ in range(3):
        first.passes.run(SWEEP)
    assert first.called == [], "no instant has passed since the change"
    with database.work() as work:
        work.run(text("UPDATE scheduled_job SET changed_at = now() - interval '10 minutes'"))
        began = store.now(work)
    for one in (second, first, second, first):
        one.passes.run(SWEEP)
    with database.work() as work:
        passed_minutes = store.now(work).minute - began.minute
    assert 1 <= len(first.called + second.called) <= 1 + passed_minutes % 60


def test_a_postponed_pass_is_due_again(worker: Worker) -> None:
    worker.do = failing(BrokerUnreachable("the broker is away"))
    worker.passes.run(EXPIRE)
    worker.do = lambda: {"runs": 3}
    worker.passes.run(EXPIRE)
    row = worker.row("expire")
    assert worker.called == ["expire", "expire"]
    assert (row.last_outcome, row.last_detail, row.passes, row.failures) == ("done", {"runs": 3}, 2, 1)
    with worker.database.work() as work:
        kept = store.passes(work, "expire", 10)
    assert [one.outcome for one in kept] == ["done", "postponed"]
    assert kept[1].detail == {"error": "the broker is away"}


def test_idle_passes_of_frequent_jobs_write_nothing_for_a_while(worker: Worker) -> None:
    written: list[int] = []

    def counted(*arguments: Any) -> None:
        written.append(len(arguments[1]))
        store_record(*arguments)

    store_record = store.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "record", counted)
        for _ in range(50):
            worker.passes.run(SWEEP)
            worker.passes.run(BY_NAME["schedules"])
        assert written == [1, 1], "the first pass of each job"
        worker.passes.close()
    assert written == [1, 1, 2], "all jobs in one transaction"
    assert worker.row("sweep").passes == worker.row("schedules").passes == 50
    assert worker.row("sweep").last_outcome == "idle"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (BrokerUnreachable("away"), PassOutcome.POSTPONED),
        (ArrieroError("no such folder"), PassOutcome.FAILED),
        (ZeroDivisionError("by zero\x00"), PassOutcome.FAILED),
    ],
)
def test_a_failure_is_recorded_at_once_and_so_is_its_end(worker: Worker, error: Exception, outcome: str) -> None:
    worker.passes.run(SWEEP)
    worker.do = failing(error)
    worker.passes.run(SWEEP)
    row = worker.row("sweep")
    assert (row.last_outcome, row.failures) == (outcome, 1)
    assert str(error).replace("\x00", "\ufffd") in str(row.last_detail)
    worker.do = lambda: None
    worker.passes.run(SWEEP)
    assert worker.row("sweep").last_outcome == "idle"
    assert worker.row("sweep").last_failed_at is not None


def test_a_paused_job_runs_by_hand_only(worker: Worker, publisher: CeleryPublisher) -> None:
    worker.change("expire", JobChange(is_paused=True))
    worker.passes.run(EXPIRE)
    assert worker.called == []
    requested = ScheduledJobs(worker.database, publisher, Settings()).run("expire")
    worker.do = lambda: {"runs": 1}
    for _ in range(2):  # the message was delivered twice
        passes.run_job(worker.passes, "expire", str(requested.id))
    assert worker.called == ["expire"]
    with worker.database.work() as work:
        ended = store.find_pass(work, "expire", requested.id)
    assert ended is not None
    assert (ended.state, ended.outcome, ended.detail, ended.worker) == ("ended", "done", {"runs": 1}, "worker")


def test_a_requested_pass_waits_for_the_one_that_runs(worker: Worker, publisher: CeleryPublisher) -> None:
    running, finish = threading.Event(), threading.Event()

    def slow() -> None:
        running.set()
        assert finish.wait(60)

    worker.do = slow
    thread = threading.Thread(target=worker.passes.run, args=(SWEEP,))
    thread.start()
    assert running.wait(60)
    worker.passes.run(SWEEP)
    assert worker.called == ["sweep"], "passes of a job do not overlap"
    requested = ScheduledJobs(worker.database, publisher, Settings()).run("sweep")
    by_hand = threading.Thread(target=passes.run_job, args=(worker.passes, "sweep", str(requested.id)))
    by_hand.start()
    finish.set()
    thread.join(60)
    by_hand.join(60)
    assert worker.called == ["sweep", "sweep"]


def test_a_requested_pass_that_nobody_begins_is_lost(worker: Worker, publisher: CeleryPublisher) -> None:
    jobs = ScheduledJobs(worker.database, publisher, Settings())
    first = jobs.run("expire")
    assert jobs.run("expire").id == first.id, "one is enough"
    with worker.database.work() as work:
        work.run(text("UPDATE scheduled_job_pass SET requested_at = now() - interval '5 minutes'"))
    second = jobs.run("expire")
    assert second.id != first.id
    assert jobs.get_pass("expire", first.id).state == "lost"


def test_the_history_of_a_job_is_bounded(database: Database) -> None:
    one = passes.JobPass("expire", 0.0, 0.1, PassOutcome.DONE, {"runs": 1})
    for _ in range(3):
        with database.work() as work:
            store.record(work, [], {ids.new_id(): one for _ in range(40)}, "worker")
    with database.work() as work:
        assert len(store.passes(work, "expire", 1000)) == store.KEPT_PASSES


def test_what_could_not_be_recorded_is_recorded_later(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    store_record = store.record
    monkeypatch.setattr(store, "record", lambda *_: failing(DatabaseUnreachable("away"))())
    worker.do = lambda: {"steps": 1}
    worker.passes.run(SWEEP)
    monkeypatch.setattr(store, "record", store_record)
    worker.do = lambda: None
    worker.passes.run(SWEEP)
    worker.passes.close()
    row = worker.row("sweep")
    assert (row.passes, row.last_outcome) == (2, "idle")
    assert row.last_done_at is not None


def test_a_wake_up_of_the_reconciler_is_never_too_early(worker: Worker) -> None:
    worker.change("reconcile", JobChange(Trigger(timedelta(minutes=5))))
    for _ in range(2):
        worker.passes.run(BY_NAME["reconcile"])
    assert worker.called == ["reconcile", "reconcile"]
