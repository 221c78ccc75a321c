"""Leases of a worker: renewed while the engine makes progress; steps stop when cancelled, lost or drained."""

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

from app.fleet.holder import Grant, ReservationHolder
from app.workflows.language import check
from app.workflows.runs import views
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.claims import Claim
from app.workflows.runs.service import Runs
from app.workflows.runs.storage.store import STOP_CHANNEL
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import StepState
from workers.leases import Holding, Leases, StopReason
from workers.pool.heartbeat import Heartbeat
from workers.pool.progress import Status

OWNER = "pool@here/1/x"
ONE_STEP = "workflow: w\nsteps: [{id: a, kind: generate, model: 'm:1', prompt: x}]"
#: Seconds that are enough on a loaded machine; a passing test does not wait for so long.
SOON = 20.0

Make = Callable[..., Leases]


@pytest.fixture
def make(runs: Runs) -> Iterator[Make]:
    made: list[Leases] = []

    def create(*, lease: float = 60.0, interval: float = 0.05, stalled: float = 0.0, of: type[Runs] = Runs) -> Leases:
        short = of(runs.database, runs.publisher, RunPolicy(timedelta(seconds=lease), max_worker_losses=3))
        one = Leases(short, OWNER, interval=timedelta(seconds=interval), stalled_for=lambda: timedelta(seconds=stalled))
        one.start()
        made.append(one)
        return one

    yield create
    for one in made:
        one.close()


def claimed(runs: Runs) -> Claim:
    run_id = runs.submit(Submission(check.parse(ONE_STEP), {})).id
    taken = runs.claim(views.run(runs.database, run_id).steps[0].id, 1, OWNER)
    assert taken is not None
    return taken


def stop_event(holding: Holding) -> threading.Event:
    event = threading.Event()
    holding.on_stop(event.set)
    return event


def lease_of(runs: Runs, step_id: UUID) -> float:
    """The remaining seconds of a step's lease."""
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


def test_a_cancel_stops_the_step_before_the_next_renewal(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    with make(interval=SOON * 10).hold(claim) as holding:
        event = stop_event(holding)
        # The thread listens once it has renewed for the first time: a cancel before that is found by the renewal.
        runs.cancel(claim.run_id)
        assert event.wait(SOON)
        assert holding.reason is StopReason.CANCELLED


def test_a_lease_of_another_owner_stops_the_step(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    with runs.database.work() as work:
        work.run(text("UPDATE step SET owner = 'another' WHERE id = :id"), {"id": claim.step_id})
    with make().hold(claim) as holding:
        assert stop_event(holding).wait(SOON)
        assert holding.reason is StopReason.LOST


def test_leases_expire_while_the_engine_makes_no_progress(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    shorten(runs, claim.step_id)
    with make(lease=1.0, stalled=5.0).hold(claim) as holding:
        assert stop_event(holding).wait(SOON)
        assert holding.reason is StopReason.LOST
        assert until(lambda: lease_of(runs, claim.step_id) < 0)


def test_draining_stops_held_and_future_steps(runs: Runs, make: Make) -> None:
    leases, first, second = make(), claimed(runs), claimed(runs)
    with leases.hold(first) as holding:
        event = stop_event(holding)
        leases.drain()
        assert event.is_set()
        with leases.hold(second) as late:
            assert stop_event(late).is_set(), "an action that is set after the stop is called immediately"
            assert late.reason is StopReason.DRAINED


def test_the_listener_reconnects_after_its_connection_was_terminated(runs: Runs, make: Make) -> None:
    claim = claimed(runs)
    with make(interval=SOON * 10).hold(claim) as holding:
        event = stop_event(holding)
        terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN arriero_stop%'"

        def listener_is_terminated() -> bool:
            with runs.database.work() as work:
                return bool(work.rows(text(terminate)))

        assert until(listener_is_terminated)
        runs.cancel(claim.run_id)
        assert event.wait(SOON)


def read_only(runs: Runs, value: str) -> None:
    """Make the server read-only, or writable again, for new and open connections, as during a fail-over."""
    with psycopg.connect(runs.database.conninfo(), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        if value == "on":
            connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        else:
            connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        connection.execute("SELECT pg_reload_conf()")


def test_a_server_that_is_read_only_for_a_while_loses_no_lease(runs: Runs, make: Make) -> None:
    """A fail-over ends with the error `cannot execute UPDATE in a read-only transaction`; renewals then continue."""
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
    with psycopg.connect(runs.database.conninfo(), autocommit=True) as connection:
        return connection.execute("SHOW default_transaction_read_only").fetchone() == ("off",)


def test_a_defect_in_a_renewal_is_logged_and_does_not_end_the_thread(runs: Runs, make: Make) -> None:
    """An error of a renewal is logged with its traceback; a lease that is not renewed in time is given up."""
    claim = claimed(runs)

    class Broken(Runs):
        def renew(self, *_: object) -> dict[UUID, tuple[int, StepState]]:
            raise KeyError("a defect")

    with structlog.testing.capture_logs() as lines, make(of=Broken, lease=1.0).hold(claim) as holding:
        assert stop_event(holding).wait(SOON)
        assert holding.reason is StopReason.LOST
    assert any(line["event"] == "leases_interrupted" and line["exc_info"] for line in lines)


def test_a_failing_stop_action_does_not_prevent_the_stop_of_other_steps(runs: Runs, make: Make) -> None:
    """The error of one action is logged, and the other steps are stopped."""
    leases, first, second = make(), claimed(runs), claimed(runs)

    def broken() -> None:
        raise RuntimeError("cannot be stopped")

    with leases.hold(first) as one, leases.hold(second) as other:
        one.on_stop(broken)
        event = stop_event(other)
        leases.drain()
        assert event.is_set()
        assert one.reason is StopReason.DRAINED


@pytest.mark.parametrize("payload", ["", "no id", "{}", "0" * 7000])
def test_a_notification_that_names_no_step_is_ignored(runs: Runs, make: Make, payload: str) -> None:
    """Every client of the database can notify; later cancels still arrive immediately."""
    claim = claimed(runs)
    with make(interval=SOON * 10).hold(claim) as holding:
        event = stop_event(holding)
        assert until(lambda: is_listening(runs))
        with runs.database.work() as work:
            work.run(text("SELECT pg_notify(:channel, :payload)"), {"channel": STOP_CHANNEL, "payload": payload})
        runs.cancel(claim.run_id)
        assert event.wait(SOON)
        assert holding.reason is StopReason.CANCELLED


def is_listening(runs: Runs) -> bool:
    with runs.database.work() as work:
        return bool(work.rows(text("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'LISTEN arriero_stop%'")))


def test_a_process_without_steps_has_no_connection(runs: Runs, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It connects for the first step, and again for one that follows later; a cancel is heard each time."""
    monkeypatch.setattr("workers.leases._LINGER", 0.1)
    leases = make(interval=SOON * 10)
    for _ in range(2):
        assert until(lambda: not is_listening(runs))
        claim = claimed(runs)
        with leases.hold(claim) as holding:
            event = stop_event(holding)
            assert until(lambda: is_listening(runs))
            runs.cancel(claim.run_id)
            assert event.wait(SOON)
            assert holding.reason is StopReason.CANCELLED


def test_the_end_of_an_earlier_attempt_does_not_end_the_lease_of_the_next(runs: Runs, make: Make) -> None:
    """The same process claims the step again while its lost attempt still runs."""
    leases, earlier = make(), claimed(runs)
    with leases.hold(earlier) as before:
        stop = stop_event(before)
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
    # The earlier attempt has ended; the later one is still renewed.
    shorten(runs, later.step_id)
    assert until(lambda: lease_of(runs, later.step_id) > 30)
    assert holding.reason is None
    inner.__exit__(None, None, None)
    assert leases.held() == []


def test_a_lease_is_given_up_in_time_while_the_database_does_not_answer(runs: Runs, make: Make) -> None:
    """The renewing thread is blocked in a call; the step is stopped nevertheless."""
    claim = claimed(runs)
    released = threading.Event()

    class Blocked(Runs):
        def renew(self, *_: object) -> dict[UUID, tuple[int, StepState]]:
            released.wait()
            return {}

    with make(of=Blocked, lease=1.0).hold(claim) as holding:
        try:
            assert stop_event(holding).wait(SOON)
            assert holding.reason is StopReason.LOST
        finally:
            released.set()


def test_a_step_between_two_heartbeats_counts_as_use(runs: Runs, make: Make) -> None:
    """Otherwise a pool of short requests would look idle, and be stopped."""
    leases, claim = make(), claimed(runs)
    holder, grant = (
        ReservationHolder(runs.database, timedelta(seconds=60)),
        Grant("p", 1, 0, "h", "m.1", "m:1", 1, 1, ()),
    )
    heartbeat = Heartbeat(holder, grant, OWNER, Status("m:1"), timedelta(seconds=60), 0.0)
    heartbeat.serve(leases, lambda: timedelta(0))
    assert not heartbeat._report().used
    with leases.hold(claim):
        pass
    report = heartbeat._report()
    assert (report.used, report.busy) == (True, 0)
    assert not heartbeat._report().used
