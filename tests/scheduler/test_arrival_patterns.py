"""Arrival patterns in the real Postgres."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from sqlalchemy import text

from app.kernel.database import Database
from app.kernel.priority import Priority
from app.scheduler import arrival_patterns
from app.scheduler.arrival_patterns import LastRequest
from app.scheduler.planner.arrivals import ArrivalPattern

BEGAN = datetime(2030, 1, 1, tzinfo=UTC)
MODELS = ("a:1", "b:1")


def passed(
    database: Database, last: Mapping[str, float], models: tuple[str, ...] = MODELS
) -> dict[str, ArrivalPattern]:
    """The patterns of a reconcile pass, which writes them; the last requests are in seconds since the beginning."""
    requests = {
        model: LastRequest(BEGAN + timedelta(seconds=after), Priority.INTERACTIVE) for model, after in last.items()
    }
    with database.work() as work:
        found = arrival_patterns.read(work, models, requests)
        arrival_patterns.write(work, found)
    return dict(found.current)


def test_a_pattern_is_the_same_after_a_restart(database: Database) -> None:
    for after in (0, 600, 620, 1210):
        passed(database, {"a:1": after})

    pattern = ArrivalPattern(BEGAN + timedelta(seconds=1210), Priority.INTERACTIVE, (600.0, 590.0))
    assert passed(database, {}) == {"a:1": pattern}


def test_a_model_that_is_requested_all_the_time_is_not_written_at_each_pass(database: Database) -> None:
    versions = set()
    for after in range(60):
        passed(database, {"a:1": after})
        with database.work() as work:
            versions.add(work.rows(text("SELECT xmin::text FROM arrival_pattern"))[0].xmin)

    assert len(versions) == 4
    assert passed(database, {})["a:1"].gaps == ()


def test_a_pass_without_requests_writes_nothing(database: Database) -> None:
    passed(database, {"a:1": 0, "b:1": 0})
    with database.work() as work:
        before = work.rows(text("SELECT model, xmin::text FROM arrival_pattern ORDER BY model"))
    passed(database, {})
    with database.work() as work:
        assert work.rows(text("SELECT model, xmin::text FROM arrival_pattern ORDER BY model")) == before


def test_patterns_of_models_that_are_gone_and_rows_with_invalid_values_go(database: Database) -> None:
    passed(database, {"a:1": 0, "b:1": 0})
    with database.work() as work:
        work.run(text("""UPDATE arrival_pattern SET gaps = '["x"]' WHERE model = 'a:1'"""))

    assert passed(database, {}, models=("b:1",)).keys() == {"b:1"}
    with database.work() as work:
        work.run(text("UPDATE arrival_pattern SET gaps = '[-5]'"))
    assert passed(database, {"b:1": 700})["b:1"].gaps == ()
    assert passed(database, {"b:1": 1300})["b:1"].gaps == (600.0,)
