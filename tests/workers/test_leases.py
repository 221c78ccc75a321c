"""Leases in a worker: renewed while there is progress, left when cancelled, lost or drained."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from uuid import UUID

import psycopg
import pytest
import structlog
from sqlalchemy import text

from app.workflows.language import check
from app.workflows.runs import views
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.claims import Claim
from app.workflows.runs.service import Runs
from app.workflows.runs.storage.store import STOP_CHANNEL
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import StepState
from workers.leases import Holding, Leases, StopReason

OWNER = "pool@here/1/x"
ONE_STEP = "workflow: w\nsteps: [{id: a, kind: generate, model: 'm:1', prompt: x}]"
#: Long enough for a loaded machine; nothing waits for it when all is well.
SOON = 20.0

Make = Callable[..., Leases]


@pytest.fixture
def make(runs: Runs) -> Iterator[Make]:
    made: list[Leases] = []

    def leases(*, lease: float = 60.0, interval: float = 0.05, stalled: float = 0.0, of: type[Runs] = Runs) -> Leases:
        short = of(runs.database, runs.publisher, RunPolicy(timedelta(seconds=lease), max_worker_losses=3))
        one = Leases(short, OWNER, interval=timedelta(seconds=interval), stalled_for=lambda: timedelta(seconds=stalled))
        one.start()
        made.append(one)
        return one

    yield leases
    for one in made:
        one.close()


def claimed(runs: Runs) -> Claim:
    run_id = runs.submit(Submission(check.parse(ONE_STEP), {})).id
    taken = runs.claim(views.run(runs.database, run_id).steps[0].id, 1, OWNER)
    assert taken is not None
    return taken


def stopped(holding: Holding) -> threading.Event:
    event = threading.Event()
    holding.on_stop(event.set)
    return event


def lease_of(runs: Runs, step_id: UUID) -> float:
    """Seconds that are left."""
    with runs.database.work() as work:
        statement = text("SELECT extract(epoch FROM lease_until - now()) AS left FROM step WHERE id = :id")
        return float(work.row(statement, {"id": step_id}).left)


def shorten(runs: Runs, step_id: UUID) -> None:
    with runs.database.work() as work:
        work.run(text("UPDATE step SET lease_until = now() + interval '1 s' WHERE id = :id"), {"id": step_id})


def until(met: Callable[[], bool]) -> bool:
    event = threading.Event()
    return any(met() or event.wait(0.05) for _ in range(int(SOON / 0.05)))


def test_a_held_lease_is_renewed(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    shorten(runs, claim.step_id)
    with make().hold(claim) as holding:
        assert until(lambda: lease_of(runs, claim.step_id) > 30)
        assert holding.reason is None


def test_a_cancel_is_heard_without_waiting_for_a_renewal(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    with make(interval=SOON * 10).hold(claim) as holding:
        event = stopped(holding)
        # The thread listens once it has renewed for the first time: a cancel before that is found by the renewal.
        runs.cancel(claim.run_id)
        assert event.wait(SOON)
        assert holding.reason is StopReason.CANCELLED


def test_a_lease_that_another_has_is_left(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    with runs.database.work() as work:
        work.run(text("UPDATE step SET owner = 'another' WHERE id = :id"), {"id": claim.step_id})
    with make().hold(claim) as holding:
        assert stopped(holding).wait(SOON)
        assert holding.reason is StopReason.LOST


def test_an_engine_without_progress_keeps_no_lease(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    shorten(runs, claim.step_id)
    with make(lease=1.0, stalled=5.0).hold(claim) as holding:
        assert stopped(holding).wait(SOON)
        assert holding.reason is StopReason.LOST
        assert until(lambda: lease_of(runs, claim.step_id) < 0)


def test_draining_stops_what_is_held_and_what_comes(runs: Runs, make: Make) -> None:
    leases, first, second = make(), claimed(runs), claimed(runs)
    with leases.hold(first) as holding:
        event = stopped(holding)
        leases.drain()
        assert event.is_set()
        with leases.hold(second) as late:
            assert stopped(late).is_set(), "an action that is set late is called at once"
            assert late.reason is StopReason.DRAINED


def test_the_listener_comes_back_after_its_connection_was_cut(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    with make(interval=SOON * 10).hold(claim) as holding:
        event = stopped(holding)
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN arriero_stop%'"

        def listener_is_cut() -> bool:
            with runs.database.work() as work:
                return bool(work.rows(text(cut)))

        assert until(listener_is_cut)
        runs.cancel(claim.run_id)
        assert event.wait(SOON)


def read_only(runs: Runs, value: str) -> None:
    """What a server says of itself while a fail-over has not ended: every connection, those that are open too."""
    with psycopg.connect(runs.database.raw_url(), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        if value == "on":
            connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        else:
            connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        connection.execute("SELECT pg_reload_conf()")


def test_a_server_that_is_read_only_for_a_while_costs_no_lease(runs: Runs, make: Make) -> None:
    """A fail-over ends with the error `cannot execute UPDATE in a read-only transaction`; renewing goes on after it."""
    claim = claimed(runs)
    failed = threading.Event()

    class Refusing(Runs):
        def renew(self, step_ids: Sequence[UUID], owner: str) -> dict[UUID, tuple[int, StepState]]:
            try:
                return super().renew(step_ids, owner)
            except Exception:
                failed.set()
                raise

    leases = make(of=Refusing)
    with leases.hold(claim) as holding:
        try:
            read_only(runs, "on")
            assert failed.wait(SOON)
        finally:
            read_only(runs, "off")
        assert until(lambda: can_write(runs))
        shorten(runs, claim.step_id)
        assert until(lambda: lease_of(runs, claim.step_id) > 30)
        assert holding.reason is None


def can_write(runs: Runs) -> bool:
    with psycopg.connect(runs.database.raw_url(), autocommit=True) as connection:
        return connection.execute("SHOW default_transaction_read_only").fetchone() == ("off",)


def test_a_defect_while_renewing_ends_neither_the_thread_nor_silence(runs: Runs, make: Make) -> None:
    """Whatever a renewal raises is logged with its traceback; what cannot be renewed in time is given up."""
    claim = claimed(runs)

    class Broken(Runs):
        def renew(self, *_: object) -> dict[UUID, tuple[int, StepState]]:
            raise KeyError("a defect")

    with structlog.testing.capture_logs() as lines, make(of=Broken, lease=1.0).hold(claim) as holding:
        assert stopped(holding).wait(SOON)
        assert holding.reason is StopReason.LOST
    assert any(line["event"] == "leases_interrupted" and line["exc_info"] for line in lines)


def test_work_that_cannot_be_stopped_does_not_keep_others_from_it(runs: Runs, make: Make) -> None:
    """One holder's action that raises is logged; the others are stopped all the same."""
    leases, first, second = make(), claimed(runs), claimed(runs)

    def broken() -> None:
        raise RuntimeError("cannot be stopped")

    with leases.hold(first) as one, leases.hold(second) as other:
        one.on_stop(broken)
        event = stopped(other)
        leases.drain()
        assert event.is_set()
        assert one.reason is StopReason.DRAINED


@pytest.mark.parametrize("payload", ["", "no id", "{}", "0" * 7000])
def test_a_notification_that_names_no_step_is_passed_over(runs: Runs, make: Make, payload: str) -> None:
    """Anybody who reaches the database can notify; the cancels after it are heard at once."""
    claim = claimed(runs)
    with make(interval=SOON * 10).hold(claim) as holding:
        event = stopped(holding)
        assert until(lambda: listens(runs))
        with runs.database.work() as work:
            work.run(text("SELECT pg_notify(:channel, :payload)"), {"channel": STOP_CHANNEL, "payload": payload})
        runs.cancel(claim.run_id)
        assert event.wait(SOON)
        assert holding.reason is StopReason.CANCELLED


def listens(runs: Runs) -> bool:
    with runs.database.work() as work:
        return bool(work.rows(text("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'LISTEN arriero_stop%'")))


def test_an_earlier_attempt_that_ends_takes_no_lease_from_the_next(runs: Runs, make: Make) -> None:
    """The same process claims the step again while the attempt that it lost is not through."""
    leases, earlier = make(), claimed(runs)
    with leases.hold(earlier) as before:
        stop = stopped(before)
        with runs.database.work() as work:
            work.run(
                text("UPDATE step SET attempt = 2, owner = :owner, lease_until = now() + interval '1 s'"),
                {"owner": OWNER},
            )
        later = dataclasses.replace(earlier, attempt=2)
        inner = leases.hold(later)
        holding = inner.__enter__()
        assert stop.wait(SOON)
        assert before.reason is StopReason.LOST
    # The earlier one has left; the later one is renewed as before.
    shorten(runs, later.step_id)
    assert until(lambda: lease_of(runs, later.step_id) > 30)
    assert holding.reason is None
    inner.__exit__(None, None, None)
    assert leases.held() == []


def test_a_lease_is_given_up_in_time_while_the_database_says_nothing(runs: Runs, make: Make) -> None:
    """Whoever renews waits in the middle of a call; the work is left all the same."""
    claim = claimed(runs)
    over = threading.Event()

    class Silent(Runs):
        def renew(self, *_: object) -> dict[UUID, tuple[int, StepState]]:
            over.wait()
            return {}

    with make(of=Silent, lease=1.0).hold(claim) as holding:
        try:
            assert stopped(holding).wait(SOON)
            assert holding.reason is StopReason.LOST
        finally:
            over.set()
