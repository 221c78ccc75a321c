"""The schedule service on the real database: each instant fires once, or has the reason why it did not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable, InvalidInput, NotFound
from app.workflows import registry
from app.workflows.language import check as workflow_check
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Accepted, Submission
from app.workflows.schedules import store as rows
from app.workflows.schedules.schedule import Schedule
from app.workflows.schedules.service import Schedules
from app.workflows.state_machine.outcomes import Success
from workers import jobs

REST = "workflow: rest\ninputs: {day: {type: string, default: none}}\nsteps: [{id: a, kind: noop}]\n"
NAME = "s"


@pytest.fixture
def schedules(runs: Runs) -> Schedules:
    store(runs, REST)
    return Schedules(runs, timedelta(days=30))


def store(runs: Runs, source: str) -> None:
    definition = workflow_check.parse(source)
    registry.put(runs.database, definition.workflow, definition)


def put(schedules: Schedules, **fields: Any) -> UUID:
    """Store a schedule and return its id; by default it fires each day."""
    document = {"schedule": NAME, "workflow": "rest", "every": "1d", "catch_up": "365d", **fields}
    view, _ = schedules.put(Schedule.model_validate({k: v for k, v in document.items() if v is not None}))
    schedule_id: UUID = view.row.id
    return schedule_id


def pass_days(database: Database, days: int = 1) -> None:
    """Simulate the passing of days: moves all stored instants into the past."""
    passed = {"passed": timedelta(days=days)}
    with database.work() as work:
        work.run(text("UPDATE schedule SET decided_to = decided_to - :passed, next_at = next_at - :passed"), passed)
        # In two steps, because a direct shift would violate the unique constraint on `at`.
        work.run(text("UPDATE schedule_fire SET at = at + interval '100 years'"))
        work.run(text("UPDATE schedule_fire SET at = at - interval '100 years' - :passed"), passed)
        work.run(text("UPDATE run SET idempotency_key = id"))


def fires(schedules: Schedules, *states: str) -> list[Any]:
    """Return the fires of the schedule, the earliest first."""
    return schedules.fires(NAME, limit=1000, states=states or None).fires[::-1]  # type: ignore[no-any-return] # the rows have no type


def advance(schedules: Schedules) -> int:
    """Do one pass of a control worker; return the number of submitted runs."""
    return sum(schedules.advance(schedule_id) for schedule_id in schedules.ready())


def end(runs: Runs, run_id: UUID) -> None:
    step = views.run(runs.database, run_id).steps[0]
    claim = runs.claim(step.id, step.attempt, "w")
    assert claim is not None
    runs.succeed(claim, "w", Success(None))


def count_runs(database: Database) -> int:
    with database.work() as work:
        return work.rows(text("SELECT count(*) AS n FROM run"))[0].n  # type: ignore[no-any-return] # a row has no type


def test_a_due_instant_fires_once_with_the_inputs_of_its_time(schedules: Schedules, database: Database) -> None:
    put(
        schedules,
        every=None,
        cron="30 23 * * *",
        timezone="America/New_York",
        inputs={"day": "{{ fire.date }} {{ fire.time }} {{ schedule.name }}"},
        priority="batch",
    )
    assert advance(schedules) == 0, "nothing was due before it was stored"

    pass_days(database)
    assert [advance(schedules), advance(schedules)] == [1, 0]
    (fire,) = fires(schedules)
    run = views.run(database, fire.run_id).run
    local = fire.at.astimezone(schedules.get(NAME).schedule.zone)
    assert (fire.state, f"{local:%H:%M}") == ("fired", "23:30")
    assert run.inputs == {"day": f"{local:%Y-%m-%d} 23:30 s"}
    assert (run.version, run.priority) == (1, "batch")
    assert run.idempotency_key == f"schedule/{schedules.get(NAME).row.id}/{fire.at.astimezone(UTC).isoformat()}"

    view = schedules.get(NAME)
    assert (view.row.fire_state, view.row.run_id, view.row.run_state) == ("fired", fire.run_id, "queued")
    assert view.next is not None
    assert view.row.next_at == view.next.at > fire.at


def test_concurrent_passes_submit_one_run_for_each_instant(schedules: Schedules, database: Database) -> None:
    schedule_id = put(schedules, overlap="allow", catch_up={"within": "60d", "runs": "all", "limit": 40})
    pass_days(database, days=40)
    barrier, faults = threading.Barrier(6), list[BaseException]()

    def work() -> None:
        try:
            barrier.wait()
            for _ in range(3):
                schedules.advance(schedule_id)
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert faults == []
    found = fires(schedules, "fired")
    assert len({fire.at for fire in found}) == len({fire.run_id for fire in found}) == 40
    assert count_runs(database) == 40
    assert fires(schedules) == found


def test_a_locked_schedule_is_left_to_the_other_transaction(schedules: Schedules, database: Database) -> None:
    put(schedules)
    pass_days(database)
    with database.work() as work:
        assert rows.lock(work, "default", NAME) is not None
        assert advance(schedules) == 0
    assert advance(schedules) == 1


class RunsWithDyingSubmitter:
    """Runs whose submitter dies after the commit, before it stores the outcome."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.database, self.lock_wait = runs, runs.database, runs.lock_wait

    def submit(self, submission: Submission) -> Accepted:
        self.runs.submit(submission)
        raise DatabaseUnreachable("cut off")


def test_a_fire_has_one_run_after_its_submitter_died_and_its_document_changed(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules)
    pass_days(database)
    with pytest.raises(DatabaseUnreachable):
        advance(replace(schedules, runs=RunsWithDyingSubmitter(runs)))  # type: ignore[arg-type] # it passes all else on to the real one
    assert [fire.state for fire in fires(schedules)] == ["starting"]

    store(runs, REST + "description: newer\n")
    assert advance(schedules) == 1
    (fire,) = fires(schedules)
    assert (fire.state, count_runs(database)) == ("fired", 1)
    assert views.run(database, fire.run_id).run.version == 1


def test_after_an_outage_the_window_is_caught_up_and_the_rest_is_recorded_as_missed(
    schedules: Schedules, database: Database
) -> None:
    put(schedules, overlap="allow", catch_up={"within": "5d", "runs": "all", "limit": 2})
    pass_days(database, days=20)

    assert advance(schedules) == 2
    old, spare, first, second = fires(schedules)
    assert [fire.state for fire in (old, spare, first, second)] == ["missed", "missed", "fired", "fired"]
    assert old.count + spare.count == 18
    assert (spare.last_at, second.at) == (first.at - timedelta(days=1), first.at + timedelta(days=1))
    assert "later than the catch-up window of 5d" in old.reason
    assert "only the latest 2" in spare.reason
    assert schedules.get(NAME).row.fire_id == second.id


def test_by_default_a_fire_is_skipped_while_an_earlier_run_is_active(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules)
    pass_days(database)
    advance(schedules)
    pass_days(database)
    assert advance(schedules) == 0
    first, second = fires(schedules)
    assert (first.state, second.state) == ("fired", "skipped")
    assert str(first.run_id) in second.reason

    end(runs, first.run_id)
    pass_days(database)
    assert advance(schedules) == 1


def test_queued_fires_start_one_after_the_other(schedules: Schedules, runs: Runs, database: Database) -> None:
    put(schedules, overlap="queue", catch_up={"within": "30d", "runs": "all"})
    pass_days(database, days=3)
    assert [advance(schedules), advance(schedules)] == [1, 0]
    assert schedules.get(NAME).row.waiting == 2

    for done in range(3):
        current = fires(schedules)[done]
        assert current.state == "fired"
        end(runs, current.run_id)
        assert advance(schedules) == (done < 2)
    assert [fire.state for fire in fires(schedules)] == ["fired"] * 3


def test_the_newest_fire_cancels_the_run_and_starts_after_its_end(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules, overlap="cancel_running")
    pass_days(database)
    advance(schedules)
    (first,) = fires(schedules)
    step = views.run(database, first.run_id).steps[0]
    held = runs.claim(step.id, 1, "w")
    assert held is not None

    for _ in range(2):
        pass_days(database)
        assert advance(schedules) == 0
    assert views.run(database, first.run_id).run.state == "cancelling"
    assert [fire.state for fire in fires(schedules)] == ["fired", "skipped", "waiting"]

    runs.succeed(held, "w", Success(None))
    assert advance(schedules) == 1
    assert [fire.state for fire in fires(schedules)] == ["fired", "skipped", "fired"]


def test_a_removed_run_does_not_block_later_fires(schedules: Schedules, database: Database) -> None:
    put(schedules)
    pass_days(database)
    advance(schedules)
    with database.work() as work:
        work.run(text("DELETE FROM run"))
    pass_days(database)

    assert advance(schedules) == 1
    assert [(fire.state, fire.run_id is None) for fire in fires(schedules)] == [("fired", True), ("fired", False)]


def test_fires_during_a_pause_are_skipped_and_not_caught_up(schedules: Schedules, database: Database) -> None:
    put(schedules)
    assert schedules.pause(NAME, "stock-taking").state == "paused"
    assert schedules.pause(NAME).row.paused_reason == "stock-taking", "it is paused already"
    pass_days(database, days=7)
    assert schedules.ready() == []

    assert schedules.resume(NAME).state == "active"
    assert advance(schedules) == 0
    (fire,) = fires(schedules)
    assert (fire.state, fire.count, fire.reason) == ("skipped", 7, "the schedule was paused")
    pass_days(database)
    assert advance(schedules) == 1


def test_fires_due_before_a_pause_are_recorded_and_waiting_ones_are_skipped(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules, overlap="queue")
    pass_days(database)
    advance(schedules)
    pass_days(database)
    schedules.pause(NAME)

    first, second = fires(schedules)
    assert (first.state, second.state, second.reason) == ("fired", "skipped", "the schedule was paused")
    end(runs, first.run_id)
    assert advance(schedules) == 0


def test_a_trigger_fires_now_and_once_for_each_key(schedules: Schedules, database: Database) -> None:
    put(schedules, inputs={"day": "{{ fire.date }}"})
    schedules.pause(NAME)

    first = schedules.trigger(NAME, key="k")
    assert (first.state, first.by_hand, first.run_state) == ("fired", True, "queued")
    assert schedules.trigger(NAME, key="k").id == first.id
    busy = schedules.trigger(NAME)
    assert (busy.state, busy.run_id) == ("skipped", None)
    assert str(first.run_id) in busy.reason
    forced = schedules.trigger(NAME, force=True)
    assert forced.state == "fired"
    assert count_runs(database) == 2
    with pytest.raises(NotFound, match="there are: s"):
        schedules.trigger("other")


def test_a_workflow_that_no_longer_fits_fails_the_fire_with_the_reason(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules, inputs={"day": "x"})
    store(runs, REST.replace("type: string, default: none", "type: integer"))
    pass_days(database)

    assert advance(schedules) == 0
    (fire,) = fires(schedules)
    assert (fire.state, fire.run_id) == ("failed", None)
    assert "inputs.day: 'x' is not of type 'integer'" in fire.reason
    assert schedules.ready() == [], "it is not tried again"

    put(schedules, inputs={"day": "x"}, version=1)
    pass_days(database)
    assert advance(schedules) == 1, "a pinned version never changes"


@pytest.mark.parametrize(
    ("fields", "where", "expected"),
    [
        ({"workflow": "rst"}, "workflow", "did you mean 'rest'?"),
        ({"version": 7}, "version", "accepted: 1"),
        ({"inputs": {"day": 5}}, "inputs.day", "'string'"),
        ({"inputs": {"dy": "x"}}, "inputs.dy", "no such input"),
        ({"inputs": {"day": "{{ fire.dte }}"}}, "inputs.day", "fire.date"),
        ({"inputs": {"day": "{{ fire.date"}}, "inputs.day", "{{ '{{' }}"),
    ],
)
def test_a_schedule_that_cannot_run_is_rejected(
    schedules: Schedules, fields: dict[str, Any], where: str, expected: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        put(schedules, **fields)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert expected in str(problem)
    assert schedules.all() == []


def test_due_fires_are_decided_by_the_old_document_before_a_change(schedules: Schedules, database: Database) -> None:
    schedule_id = put(schedules, overlap="allow", catch_up={"within": "30d", "runs": "all"})
    pass_days(database, days=2)
    assert put(schedules, overlap="allow", every="1h") == schedule_id
    assert advance(schedules) == 2
    assert schedules.preview(NAME, 2)[0].at.minute == 0

    before = schedules.get(NAME).row.decided_to
    put(schedules, overlap="allow", every="1h", description="other words")
    assert schedules.get(NAME).row.decided_to == before


def test_an_ended_schedule_does_not_fire(schedules: Schedules, database: Database) -> None:
    put(schedules, start="2020-01-01", end="2021-01-01")
    pass_days(database)

    assert schedules.ready() == []
    assert (schedules.get(NAME).state, schedules.preview(NAME, 9)) == ("ended", [])


def test_old_fires_are_deleted_except_active_ones(schedules: Schedules, database: Database) -> None:
    put(schedules, overlap="allow")
    for _ in range(3):
        pass_days(database)
        advance(schedules)
    kept, gone, _ = fires(schedules)
    with database.work() as work:
        month = "interval '31 days'"
        work.run(text(f"UPDATE schedule_fire SET at = at - {month}, decided_at = now() - {month}"))
        work.run(text("UPDATE run SET state = 'succeeded' WHERE id <> :id"), {"id": kept.run_id})
    for _ in range(2):
        pass_days(database)
        advance(schedules)

    found = [fire.id for fire in fires(schedules)]
    assert kept.id in found
    assert gone.id not in found


def test_deleting_a_schedule_keeps_its_runs(schedules: Schedules, database: Database) -> None:
    put(schedules)
    pass_days(database)
    advance(schedules)
    schedules.delete(NAME)

    assert (schedules.all(), count_runs(database)) == ([], 1)
    with pytest.raises(NotFound):
        schedules.delete(NAME)


def test_pages_of_fires_have_no_gaps(schedules: Schedules, database: Database) -> None:
    put(schedules, overlap="allow", catch_up={"within": "30d", "runs": "all"})
    pass_days(database, days=5)
    advance(schedules)

    def pages() -> Iterator[Any]:
        cursor = None
        while True:
            page = schedules.fires(NAME, limit=2, before=cursor)
            yield from page.fires
            cursor = page.next_cursor
            if cursor is None:
                return

    assert list(pages()) == fires(schedules)[::-1]


def test_a_broken_schedule_does_not_block_the_others(schedules: Schedules, database: Database) -> None:
    broken = put(schedules)
    with database.work() as work:
        work.run(text("""UPDATE schedule SET name = 'broken', document = '{"from": "a later version"}'"""))
    put(schedules)
    pass_days(database)

    class Standing:
        runs = schedules.runs
        settings = type("Settings", (), {"schedules": type("Section", (), {"keep_fires": timedelta(days=1)})})

    jobs.run_schedules(Standing())  # type: ignore[arg-type] # it has what the job reads of a runtime
    with database.work() as work:
        (fire,) = work.rows(text("SELECT schedule_id, state FROM schedule_fire"))
    assert fire.state == "fired"
    assert fire.schedule_id != broken


def test_instants_come_from_the_clock_of_the_database(schedules: Schedules) -> None:
    """A new schedule fires within its interval, even when the host's clock is wrong."""
    put(schedules, every="1m")
    view = schedules.get(NAME)
    assert view.next is not None
    assert timedelta(0) < view.next.at - view.row.created_at <= timedelta(minutes=1, seconds=1)
    assert view.next.at == datetime.fromtimestamp(view.next.at.timestamp() // 60 * 60, UTC)


def test_a_fire_that_raises_fails_and_the_others_fire(
    schedules: Schedules, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(schedules)
    put(schedules, schedule="other")
    pass_days(database)
    real = Schedules._submit

    def submit(self: Schedules, schedule: Schedule, *arguments: Any) -> UUID:
        if schedule.schedule == NAME:
            raise OverflowError("a defect")
        return real(self, schedule, *arguments)

    monkeypatch.setattr(Schedules, "_submit", submit)
    assert schedules.advance_all() == 1
    (fire,) = fires(schedules)
    assert fire.state == "failed"
    assert "OverflowError: a defect" in fire.reason
    assert schedules.ready() == []


def test_a_schedule_that_raises_is_paused_with_the_reason_and_the_others_fire(
    schedules: Schedules, database: Database
) -> None:
    """For example, its document was accepted by another version of Arriero."""
    schedule_id = put(schedules)
    put(schedules, schedule="other")
    pass_days(database)
    with database.work() as work:
        work.run(text("UPDATE schedule SET document = '{}' WHERE id = :id"), {"id": schedule_id})
    assert schedules.advance_all() == 1
    with database.work() as work:
        row = work.row(text("SELECT paused_reason FROM schedule WHERE id = :id"), {"id": schedule_id})
    assert row is not None
    assert "ValidationError" in row.paused_reason
    assert schedules.ready() == []


def test_a_schedule_does_not_wait_for_locked_rows_of_another(schedules: Schedules, database: Database) -> None:
    """The last run of a schedule must be cancelled, and another transaction has locked it."""
    put(schedules, overlap="cancel_running")
    pass_days(database)
    schedules.advance_all()
    (fire,) = fires(schedules)
    put(schedules, schedule="other")
    pass_days(database)
    with database.work() as work:
        work.rows(text("SELECT FROM run WHERE id = :id FOR UPDATE"), {"id": fire.run_id})
        assert schedules.advance_all() == 1
    schedules.advance_all()
    assert views.run(database, fire.run_id).run.error["message"] == "a later fire of the schedule s replaced it"
    assert schedules.advance_all() == 1
