"""The work that planning, agents and schedules do each second does not grow with the ended rows that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from app.catalog import catalog, header
from app.fleet.hosts import Hosts
from app.footprint import configuration, estimate, measurements
from app.footprint.layout import KnownLayout
from app.kernel.database import Database
from app.kernel.priority import Priority
from app.scheduler import needs, reconcile
from app.scheduler.observation import FleetDemand
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.reconcile_pass import ReconcileTimes
from app.workflows import registry
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.schedules.schedule import Schedule
from app.workflows.schedules.service import Schedules
from tests.fleet.granting import LEASE, device_report
from tests.growth import analyze, rows_read

#: How many rows are kept, first and then; and how many more may be read for that.
FEW, MANY, MORE = 1_000, 10_000, 150
TIMES = ReconcileTimes(hold=timedelta(seconds=30), drain=timedelta(seconds=20), lost_after=timedelta(minutes=2))
ENTRY = '[[models]]\nname = "{}:1"\nuse_cases = ["chat"]\nsource = {{ path = "/m.gguf" }}\n'
MODELS = catalog.parse(ENTRY.format("a") + ENTRY.format("b"), "catalog.toml").models
PAST = "now() - interval '5 hours'"

ENDED = f"""
    WITH one AS (
        INSERT INTO reservation (id, epoch, revision, state, host, configuration, draining, pinned, namespace,
                                 lease_until, granted_at, released_at, release_reason)
        SELECT gen_random_uuid(), n, 0, 'released', 'h', 'kept', false, false, '', {PAST}, {PAST}, {{released}}, 'over'
        FROM generate_series(1, :count) AS n RETURNING id
    ), made AS (
        INSERT INTO pool (id, configuration, model, slots, purpose, reason, desired, estimate_seconds, created_at)
        SELECT id, 'kept', 'a:1', 4, 'demand', 'x', 'run', 0, {PAST} FROM one RETURNING id
    )
    SELECT count(*) FROM made
"""
PROCESSES = f"""
    INSERT INTO pool_process (pool_id, state, started_at, ended_at, failed, ending, log_tail)
    SELECT id, 'ended', {PAST}, {PAST}, true, 'it ended', repeat('x', 500) FROM pool WHERE configuration = 'kept'
    ON CONFLICT DO NOTHING
"""
REPORTS = f"""
    INSERT INTO pool_report (pool_id, phase, progress, detail, worker, busy, heartbeat_at)
    SELECT id, 'serving', 1, '', 'w', 0, {PAST} FROM pool WHERE configuration = 'kept' ON CONFLICT DO NOTHING
"""
COMMANDS = f"""
    INSERT INTO pool_command (id, command, model, reason, created_at, done_at)
    SELECT gen_random_uuid(), (ARRAY['start', 'stop'])[n % 2 + 1], 'a:1', 'x', {PAST}, {PAST}
    FROM generate_series(1, :count) AS n
"""
MOVES = """
    INSERT INTO defragmentation (at, moves, gains, stuck)
    SELECT now() - n * interval '1 minute', '[]', '[]', '[]' FROM generate_series(1, :count) AS n
    ON CONFLICT DO NOTHING
"""
FOOTPRINTS = """
    INSERT INTO footprint (key, family, identity, loads, failures)
    SELECT 'kept' || n, :family, '{}', 1, 0 FROM generate_series(1, :count) AS n ON CONFLICT DO NOTHING
"""


@pytest.fixture
def one(database: Database) -> Iterator[Database]:
    """The same database through one connection."""
    made = Database(database.url, pool_size=1)
    yield made
    made.close()


@pytest.fixture
def schedules(one: Database, runs: Runs) -> Schedules:
    return Schedules(replace(runs, database=one), timedelta(days=30))


@pytest.fixture
def fleet(one: Database) -> tuple[Hosts, int]:
    """A host with one device, and its agent."""
    hosts = Hosts(one, LEASE, LEASE)
    agent = hosts.join("h", "h", 8, [device_report("d", "gpu-0")], {})
    ids = [needs.configuration_id(model) for model in MODELS]
    hosts.declare_layouts(KnownLayout(id_, "L4", (400,), "closed form", timedelta(seconds=1), 10.0) for id_ in ids)
    hosts.heartbeat("h", agent, [], ids, [])
    return hosts, agent


def costs(one: Database, keep: Callable[[int], object], act: Callable[[], object]) -> tuple[int, int]:
    """What `act` reads when few rows are kept, and when many are."""
    found = []
    for count in (FEW, MANY - FEW):
        keep(count)
        analyze(one)
        act()
        # The least of three: other connections to the database may read at the same time.
        found.append(min(rows_read(one, act) for _ in range(3)))
    return found[0], found[1]


def insert(one: Database, *statements: str, **more: str) -> Callable[[int], None]:
    def keep(count: int) -> None:
        with one.work() as work:
            for statement in statements:
                work.run(text(statement), {"count": count, **more})

    return keep


def run_pass(one: Database) -> None:
    def read_demand(_: object) -> FleetDemand:
        with one.work() as work:
            row = work.row(text("SELECT now() AS now"))
        assert row is not None
        waiting = [WaitingSteps("b:1", Priority.STANDARD, 1, row.now)]
        return FleetDemand(MODELS, waiting, {}, {})

    assert reconcile.reconcile(one, read_demand, TIMES) is not None


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param((ENDED.format(released=PAST), PROCESSES, REPORTS), id="pools"),
        pytest.param((COMMANDS,), id="commands"),
        pytest.param((MOVES,), id="defragmentations"),
    ],
)
def test_planning_does_not_read_ended_rows(one: Database, fleet: tuple[Hosts, int], kept: tuple[str, ...]) -> None:
    few, many = costs(one, insert(one, *kept), lambda: run_pass(one))
    assert many < few + MORE
    few, many = costs(
        one, insert(one, *kept), lambda: reconcile.defragment(one, lambda _: FleetDemand(MODELS, [], {}, {}), TIMES)
    )
    assert many < few + MORE


def test_garbage_is_collected_a_little_at_a_time(one: Database, fleet: tuple[Hosts, int]) -> None:
    released = "now() - interval '2 days'"
    _, many = costs(one, insert(one, ENDED.format(released=released), PROCESSES, REPORTS), lambda: run_pass(one))
    assert many < MANY  # ten entries and rows of each that is deleted, so all at once would be ten times as many
    with one.work() as work:
        row = work.row(text("SELECT count(*) AS kept FROM pool WHERE configuration = 'kept'"))
    assert row is not None
    assert row.kept < MANY


def test_a_beat_of_an_agent_does_not_read_ended_rows(one: Database, fleet: tuple[Hosts, int]) -> None:
    hosts, agent = fleet
    keep = insert(one, ENDED.format(released=PAST), PROCESSES, REPORTS)
    few, many = costs(one, keep, lambda: hosts.heartbeat("h", agent, [], [], []))
    assert many < few + MORE


def test_an_estimate_does_not_read_every_measurement(one: Database, smollm2: Path) -> None:
    entry = catalog.parse(ENTRY.format("a"), "catalog.toml").models[0]
    identity = estimate.identify(header.read(smollm2), configuration.of_model(entry, gpus=0), [])

    def find() -> None:
        with one.work() as work:
            measurements.find(work, identity)

    few, many = costs(one, insert(one, FOOTPRINTS, family=identity.family), find)
    assert many < few + MORE


def test_a_poll_for_schedules_does_not_read_those_that_are_not_due(one: Database, schedules: Schedules) -> None:
    statement = """
        INSERT INTO schedule (id, name, document, decided_to, next_at, created_at, updated_at)
        SELECT gen_random_uuid(), 'kept-' || gen_random_uuid(), '{}', now(), now() + interval '1 hour', now(), now()
        FROM generate_series(1, :count)
    """
    few, many = costs(one, insert(one, statement), schedules.ready)
    assert many < few + MORE


def test_a_schedule_does_not_read_its_old_fires(one: Database, schedules: Schedules) -> None:
    registry.put(one, "rest", check.parse("workflow: rest\nsteps: [{id: a, kind: noop}]\n"))
    document = {"schedule": "s", "workflow": "rest", "every": "1d", "catch_up": "365d"}
    view, _ = schedules.put(Schedule.model_validate(document))
    statement = """
        INSERT INTO schedule_fire (id, schedule_id, at, by_hand, due_at, state, open, decided_at)
        SELECT gen_random_uuid(), schedule.id, past, false, past, 'fired', false, past + interval '1 second'
        FROM schedule, (
            SELECT now() - n * interval '2 minutes' - random() * interval '1 minute' AS past
            FROM generate_series(1, :count) AS n
        ) AS instants WHERE name = 's'
    """
    few, many = costs(one, insert(one, statement), lambda: schedules.advance(view.row.id))
    assert many < few + MORE
