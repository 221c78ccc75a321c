"""Schedules on the real database: what fires, once; what does not, and why."""

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
    """A schedule that fires each day, if not told otherwise."""
    document = {"schedule": NAME, "workflow": "rest", "every": "1d", "catch_up": "365d", **fields}
    view, _ = schedules.put(Schedule.model_validate({k: v for k, v in document.items() if v is not None}))
    schedule_id: UUID = view.row.id
    return schedule_id


def lapse(database: Database, days: int = 1) -> None:
    """Days pass: all that has happened did so that much earlier."""
    passed = {"passed": timedelta(days=days)}
    with database.work() as work:
        work.run(text("UPDATE schedule SET decided_to = decided_to - :passed, next_at = next_at - :passed"), passed)
        # Out of the way first: each row would meet the one before it.
        work.run(text("UPDATE schedule_fire SET at = at + interval '100 years'"))
        work.run(text("UPDATE schedule_fire SET at = at - interval '100 years' - :passed"), passed)
        work.run(text("UPDATE run SET idempotency_key = id"))


def fires(schedules: Schedules, *states: str) -> list[Any]:
    """The fires of the one schedule, the earliest first."""
    return schedules.fires(NAME, limit=1000, states=states or None).fires[::-1]  # type: ignore[no-any-return]


def look(schedules: Schedules) -> int:
    """What a control worker does at each tick; gives how many runs it submitted."""
    return sum(schedules.advance(schedule_id) for schedule_id in schedules.ready())


def end(runs: Runs, run_id: UUID) -> None:
    step = views.run(runs.database, run_id).steps[0]
    claim = runs.claim(step.id, step.attempt, "w")
    assert claim is not None
    runs.succeed(claim, "w", Success(None))


def count_runs(database: Database) -> int:
    with database.work() as work:
        return work.rows(text("SELECT count(*) AS n FROM run"))[0].n  # type: ignore[no-any-return]


def test_a_due_instant_fires_once_with_the_inputs_of_its_time(schedules: Schedules, database: Database) -> None:
    put(
        schedules,
        every=None,
        cron="30 23 * * *",
        timezone="America/New_York",
        inputs={"day": "{{ fire.date }} {{ fire.time }} {{ schedule.name }}"},
        priority="batch",
    )
    assert look(schedules) == 0, "nothing was due before it was made"

    lapse(database)
    assert [look(schedules), look(schedules)] == [1, 0]
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


def test_many_look_at_once_and_each_instant_has_one_run(schedules: Schedules, database: Database) -> None:
    schedule_id = put(schedules, overlap="allow", catch_up={"within": "60d", "runs": "all", "limit": 40})
    lapse(database, days=40)
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


def test_who_finds_a_schedule_locked_leaves_it_to_the_other(schedules: Schedules, database: Database) -> None:
    put(schedules)
    lapse(database)
    with database.work() as work:
        assert rows.lock(work, NAME) is not None
        assert look(schedules) == 0
    assert look(schedules) == 1


class Dying:
    """Runs whose submitter dies after the commit, before it can tell anybody."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.database, self.lock_wait = runs, runs.database, runs.lock_wait

    def submit(self, submission: Submission) -> Accepted:
        self.runs.submit(submission)
        raise DatabaseUnreachable("cut off")


def test_a_submitter_that_dies_leaves_one_run_whatever_changed_since(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules)
    lapse(database)
    with pytest.raises(DatabaseUnreachable):
        look(replace(schedules, runs=Dying(runs)))  # type: ignore[arg-type]
    assert [fire.state for fire in fires(schedules)] == ["starting"]

    store(runs, REST + "description: newer\n")
    assert look(schedules) == 1
    (fire,) = fires(schedules)
    assert (fire.state, count_runs(database)) == ("fired", 1)
    assert views.run(database, fire.run_id).run.version == 1


def test_an_outage_is_made_up_within_the_window_and_the_rest_is_told(schedules: Schedules, database: Database) -> None:
    put(schedules, overlap="allow", catch_up={"within": "5d", "runs": "all", "limit": 2})
    lapse(database, days=20)

    assert look(schedules) == 2
    old, spare, first, second = fires(schedules)
    assert [fire.state for fire in (old, spare, first, second)] == ["missed", "missed", "fired", "fired"]
    assert old.count + spare.count == 18
    assert (spare.last_at, second.at) == (first.at - timedelta(days=1), first.at + timedelta(days=1))
    assert "later than the catch-up window of 5d" in old.reason
    assert "only the latest 2" in spare.reason
    assert schedules.get(NAME).row.fire_id == second.id


def test_by_default_a_fire_is_skipped_while_an_earlier_run_goes_on(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules)
    lapse(database)
    look(schedules)
    lapse(database)
    assert look(schedules) == 0
    first, second = fires(schedules)
    assert (first.state, second.state) == ("fired", "skipped")
    assert str(first.run_id) in second.reason

    end(runs, first.run_id)
    lapse(database)
    assert look(schedules) == 1


def test_queued_fires_begin_one_after_the_other(schedules: Schedules, runs: Runs, database: Database) -> None:
    put(schedules, overlap="queue", catch_up={"within": "30d", "runs": "all"})
    lapse(database, days=3)
    assert [look(schedules), look(schedules)] == [1, 0]
    assert schedules.get(NAME).row.waiting == 2

    for done in range(3):
        current = fires(schedules)[done]
        assert current.state == "fired"
        end(runs, current.run_id)
        assert look(schedules) == (done < 2)
    assert [fire.state for fire in fires(schedules)] == ["fired"] * 3


def test_the_newest_fire_cancels_and_begins_when_that_is_confirmed(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules, overlap="cancel_running")
    lapse(database)
    look(schedules)
    (first,) = fires(schedules)
    step = views.run(database, first.run_id).steps[0]
    held = runs.claim(step.id, 1, "w")
    assert held is not None

    for _ in range(2):
        lapse(database)
        assert look(schedules) == 0
    assert views.run(database, first.run_id).run.state == "cancelling"
    assert [fire.state for fire in fires(schedules)] == ["fired", "skipped", "waiting"]

    runs.succeed(held, "w", Success(None))
    assert look(schedules) == 1
    assert [fire.state for fire in fires(schedules)] == ["fired", "skipped", "fired"]


def test_a_run_that_was_removed_keeps_nobody(schedules: Schedules, database: Database) -> None:
    put(schedules)
    lapse(database)
    look(schedules)
    with database.work() as work:
        work.run(text("DELETE FROM run"))
    lapse(database)

    assert look(schedules) == 1
    assert [(fire.state, fire.run_id is None) for fire in fires(schedules)] == [("fired", True), ("fired", False)]


def test_nothing_fires_while_paused_and_nothing_is_made_up_after(schedules: Schedules, database: Database) -> None:
    put(schedules)
    assert schedules.pause(NAME, "stock-taking").state == "paused"
    assert schedules.pause(NAME).row.paused_reason == "stock-taking", "it is paused already"
    lapse(database, days=7)
    assert schedules.ready() == []

    assert schedules.resume(NAME).state == "active"
    assert look(schedules) == 0
    (fire,) = fires(schedules)
    assert (fire.state, fire.count, fire.reason) == ("skipped", 7, "the schedule was paused")
    lapse(database)
    assert look(schedules) == 1


def test_what_was_due_before_a_pause_is_told_and_what_waits_is_dropped(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules, overlap="queue")
    lapse(database)
    look(schedules)
    lapse(database)
    schedules.pause(NAME)

    first, second = fires(schedules)
    assert (first.state, second.state, second.reason) == ("fired", "skipped", "the schedule was paused")
    end(runs, first.run_id)
    assert look(schedules) == 0


def test_a_trigger_fires_now_and_the_same_key_once(schedules: Schedules, database: Database) -> None:
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


def test_a_workflow_that_breaks_later_fails_the_fire_and_says_why(
    schedules: Schedules, runs: Runs, database: Database
) -> None:
    put(schedules, inputs={"day": "x"})
    store(runs, REST.replace("type: string, default: none", "type: integer"))
    lapse(database)

    assert look(schedules) == 0
    (fire,) = fires(schedules)
    assert (fire.state, fire.run_id) == ("failed", None)
    assert "inputs.day: 'x' is not of type 'integer'" in fire.reason
    assert schedules.ready() == [], "it is not tried again"

    put(schedules, inputs={"day": "x"}, version=1)
    lapse(database)
    assert look(schedules) == 1, "a pinned version never changes"


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({"workflow": "rst"}, "workflow", "did you mean 'rest'?"),
        ({"version": 7}, "version", "accepted: 1"),
        ({"inputs": {"day": 5}}, "inputs.day", "'string'"),
        ({"inputs": {"dy": "x"}}, "inputs.dy", "no such input"),
        ({"inputs": {"day": "{{ fire.dte }}"}}, "inputs.day", "fire.date"),
        ({"inputs": {"day": "{{ fire.date"}}, "inputs.day", "{{ '{{' }}"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(
    schedules: Schedules, fields: dict[str, Any], where: str, said: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        put(schedules, **fields)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert said in str(problem)
    assert schedules.all() == []


def test_a_change_decides_what_was_due_as_it_was_and_begins_anew(schedules: Schedules, database: Database) -> None:
    schedule_id = put(schedules, overlap="allow", catch_up={"within": "30d", "runs": "all"})
    lapse(database, days=2)
    assert put(schedules, overlap="allow", every="1h") == schedule_id
    assert look(schedules) == 2
    assert schedules.preview(NAME, 2)[0].at.minute == 0

    before = schedules.get(NAME).row.decided_to
    put(schedules, overlap="allow", every="1h", description="other words")
    assert schedules.get(NAME).row.decided_to == before


def test_an_ended_schedule_fires_no_more(schedules: Schedules, database: Database) -> None:
    put(schedules, start="2020-01-01", end="2021-01-01")
    lapse(database)

    assert schedules.ready() == []
    assert (schedules.get(NAME).state, schedules.preview(NAME, 9)) == ("ended", [])


def test_old_fires_are_forgotten_but_not_those_that_go_on(schedules: Schedules, database: Database) -> None:
    put(schedules, overlap="allow")
    for _ in range(3):
        lapse(database)
        look(schedules)
    kept, gone, _ = fires(schedules)
    with database.work() as work:
        month = "interval '31 days'"
        work.run(text(f"UPDATE schedule_fire SET at = at - {month}, decided_at = now() - {month}"))
        work.run(text("UPDATE run SET state = 'succeeded' WHERE id <> :id"), {"id": kept.run_id})
    for _ in range(2):
        lapse(database)
        look(schedules)

    found = [fire.id for fire in fires(schedules)]
    assert kept.id in found
    assert gone.id not in found


def test_a_removed_schedule_leaves_its_runs(schedules: Schedules, database: Database) -> None:
    put(schedules)
    lapse(database)
    look(schedules)
    schedules.delete(NAME)

    assert (schedules.all(), count_runs(database)) == ([], 1)
    with pytest.raises(NotFound):
        schedules.delete(NAME)


def test_pages_of_fires_have_no_gaps(schedules: Schedules, database: Database) -> None:
    put(schedules, overlap="allow", catch_up={"within": "30d", "runs": "all"})
    lapse(database, days=5)
    look(schedules)

    def pages() -> Iterator[Any]:
        cursor = None
        while True:
            page = schedules.fires(NAME, limit=2, before=cursor)
            yield from page.fires
            cursor = page.next_cursor
            if cursor is None:
                return

    assert list(pages()) == fires(schedules)[::-1]


def test_a_schedule_that_breaks_does_not_keep_the_others(schedules: Schedules, database: Database) -> None:
    broken = put(schedules)
    with database.work() as work:
        work.run(text("""UPDATE schedule SET name = 'broken', document = '{"from": "a later version"}'"""))
    put(schedules)
    lapse(database)

    class Standing:
        runs = schedules.runs
        settings = type("Settings", (), {"schedules": type("Section", (), {"keep_fires": timedelta(days=1)})})

    jobs.run_schedules(Standing())  # type: ignore[arg-type]
    with database.work() as work:
        (fire,) = work.rows(text("SELECT schedule_id, state FROM schedule_fire"))
    assert fire.state == "fired"
    assert fire.schedule_id != broken


def test_instants_are_the_databases_own(schedules: Schedules) -> None:
    """A schedule that is made now fires next within its interval, whatever the host's clock says."""
    put(schedules, every="1m")
    view = schedules.get(NAME)
    assert view.next is not None
    assert timedelta(0) < view.next.at - view.row.created_at <= timedelta(minutes=1, seconds=1)
    assert view.next.at == datetime.fromtimestamp(view.next.at.timestamp() // 60 * 60, UTC)


def test_a_fire_that_raises_has_failed_and_the_others_fire(
    schedules: Schedules, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(schedules)
    put(schedules, schedule="other")
    lapse(database)
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
    """Its document was accepted by another version, say."""
    schedule_id = put(schedules)
    put(schedules, schedule="other")
    lapse(database)
    with database.work() as work:
        work.run(text("UPDATE schedule SET document = '{}' WHERE id = :id"), {"id": schedule_id})
    assert schedules.advance_all() == 1
    with database.work() as work:
        row = work.row(text("SELECT paused_reason FROM schedule WHERE id = :id"), {"id": schedule_id})
    assert row is not None
    assert "ValidationError" in row.paused_reason
    assert schedules.ready() == []


def test_no_schedule_waits_for_the_rows_of_another(schedules: Schedules, database: Database) -> None:
    """A schedule's last run is to be cancelled, and another transaction holds it."""
    put(schedules, overlap="cancel_running")
    lapse(database)
    schedules.advance_all()
    (fire,) = fires(schedules)
    put(schedules, schedule="other")
    lapse(database)
    with database.work() as work:
        work.rows(text("SELECT FROM run WHERE id = :id FOR UPDATE"), {"id": fire.run_id})
        assert schedules.advance_all() == 1
    schedules.advance_all()
    assert views.run(database, fire.run_id).run.error["message"] == "a later fire of the schedule s replaced it"
    assert schedules.advance_all() == 1
