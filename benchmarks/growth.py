"""
Growth: what the jobs on a timer cost when much waits, and when much is kept.

Each job runs on its own in an embedded Postgres that holds more and more: first runs that have ended and are kept, then
a map whose items have not begun, then steps that are ready. For each the median of its time is taken, and how many rows
and index entries Postgres reads for it (its own counters).

`python -m benchmarks.growth [--quick] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from app.catalog import files
from app.devices.device import HardwareKind, MeasuredDevice
from app.fleet.hosts import DeviceReport, Hosts
from app.footprint.layout import KnownLayout
from app.inference import demand
from app.kernel import log
from app.kernel.broker import CeleryPublisher, celery_app
from app.kernel.database import Database
from app.kernel.sections.servers import BrokerSettings, LogSettings
from app.scheduler import needs, reconcile
from app.scheduler.reconcile_pass import ReconcileTimes
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.service import Runs
from app.workflows.schedules.service import Schedules
from benchmarks.steps import servers

#: Times that each job runs for a figure.
ROUNDS = 7
MODEL = "smollm2:135m"
TIMES = ReconcileTimes(timedelta(seconds=30), timedelta(seconds=20), timedelta(minutes=2))

_COLUMNS = """
    id, run_id, key, position, kind, model, model_index, queue, priority, rank, state, delegated, attempt, failures,
    losses, tokens_in, tokens_out, created_at, ready_at, started_at, finished_at
"""
_RUNS = """
    INSERT INTO run (id, workflow, sha256, state, paused, workflow_paused, priority, rank, inputs, depth, retention_s,
                     created_at, started_at, finished_at, expires_at)
    SELECT gen_random_uuid(), :name, 'kept', CAST(:state AS text), false, false, 'standard', 1, '{}', 0, 2592000,
           past, past, CASE WHEN :state = 'succeeded' THEN past END,
           CASE WHEN :state = 'succeeded' THEN now() + interval '29 days' END
    FROM (
        SELECT now() - interval '1 day' + n * interval '1 ms' AS past FROM generate_series(1, :count) AS n
    ) AS instants
"""
_STEPS = f"""
    INSERT INTO step ({_COLUMNS})
    SELECT gen_random_uuid(), run.id, 's' || n, n, 'generate', '{MODEL}', 0, 'model.smollm2-135m', 'standard', 1,
           CAST(:state AS text), false, 1, 0, 0, 0, 0, run.created_at,
           CASE WHEN :lately THEN now() ELSE run.created_at END,
           CASE WHEN :state = 'succeeded' THEN run.created_at END,
           CASE WHEN :state = 'succeeded' THEN run.created_at + interval '2 s' END
    FROM run, generate_series(1, :each) AS n WHERE run.workflow = :name
"""
_ATTEMPTS = """
    INSERT INTO attempt (step_id, attempt, owner, model, started_at, finished_at, outcome)
    SELECT step.id, 1, 'w@h/1/a', model, step.started_at, step.finished_at, 'succeeded'
    FROM step JOIN run ON run.id = run_id WHERE run.workflow = :name
"""
_MAP = """
    WITH map AS (
        INSERT INTO step (id, run_id, key, position, kind, model_index, queue, priority, rank, state, delegated,
                          attempt, failures, losses, tokens_in, tokens_out)
        SELECT gen_random_uuid(), id, 'read', 0, 'map', 0, 'io', 'standard', 1, 'awaiting', true, 1, 0, 0, 0, 0
        FROM run WHERE workflow = 'map' RETURNING id, run_id
    )
    INSERT INTO fan_out (step_id, total, waiting, in_flight, failed, stopping)
    SELECT id, CAST(:count AS integer), CAST(:count AS integer), 0, 0, false FROM map
"""
_ITEMS = f"""
    INSERT INTO step (id, run_id, parent_id, item, key, position, kind, model, model_index, queue, priority, rank,
                      state, delegated, attempt, failures, losses, tokens_in, tokens_out)
    SELECT gen_random_uuid(), run_id, id, n, 'read[' || n || ']', 0, 'generate', '{MODEL}', 0, 'model.smollm2-135m',
           'standard', 1, 'pending', false, 0, 0, 0, 0, 0
    FROM step, generate_series(0, :count - 1) AS n WHERE kind = 'map'
"""
_READ = text("""
    SELECT ((SELECT sum(seq_tup_read) FROM pg_stat_user_tables)
          + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes))::bigint AS total
""")


@dataclass(frozen=True, slots=True)
class Figure:
    """One job at one size."""

    job: str
    #: What there is much of, and how much.
    of: str
    count: int
    #: Median of its time, milliseconds.
    ms: float
    #: Rows and index entries that Postgres read.
    rows: int


class Site:
    """A fleet of one host, in a database that holds as much as it is told."""

    def __init__(self, database: Database, runs: Runs) -> None:
        self.database, self.catalog = database, files.read_catalog()
        self.schedules = Schedules(runs, timedelta(days=30))
        self.hosts = Hosts(database, timedelta(hours=1), timedelta(hours=1))
        devices = [
            DeviceReport(
                "h/sim-0",
                "simulated",
                10**10,
                MeasuredDevice("sim-0", HardwareKind.SIMULATED, "simulated", 10**10, 10**10, bandwidth=10**9),
            )
        ]
        self.agent = self.hosts.join("h", "h", 8, devices, {})
        ids = [needs.configuration_id(model) for model in self.catalog.models]
        self.hosts.declare_layouts(
            KnownLayout(id_, "simulated", (10**9,), "catalogue", timedelta(seconds=1), 10.0) for id_ in ids
        )
        self.hosts.heartbeat("h", self.agent, [], ids, [])

    @property
    def jobs(self) -> dict[str, Callable[[], object]]:
        """What is done each second, by name."""
        return {
            "demand": lambda: demand.observe(self.database, self.catalog, []),
            "reconcile": lambda: reconcile.reconcile(
                self.database, lambda work: demand.read(work, self.catalog, []), TIMES
            ),
            "defragment": lambda: reconcile.defragment(
                self.database, lambda work: demand.read(work, self.catalog, []), TIMES
            ),
            "agent's heartbeat": lambda: self.hosts.heartbeat("h", self.agent, [], [], []),
            "schedules": self.schedules.ready,
        }

    def keep_ended(self, steps: int) -> None:
        """More runs that have ended, of ten steps each."""
        self._put(_RUNS, name="new", state="succeeded", count=steps // 10)
        self._put(_STEPS, name="new", state="succeeded", each=10, lately=False)
        self._put(_ATTEMPTS, name="new")
        self._put("UPDATE run SET workflow = 'kept' WHERE workflow = 'new'")

    def put_map(self, items: int) -> None:
        """One map, none of whose items has begun."""
        self.clear("map")
        self._put(_RUNS, name="map", state="running", count=1)
        self._put(_MAP, count=items)
        self._put(_ITEMS, count=items)

    def put_ready(self, steps: int) -> None:
        """Runs with a step each that is ready, all of them since the last minutes."""
        self.clear("ready")
        self._put(_RUNS, name="ready", state="running", count=steps)
        self._put(_STEPS, name="ready", state="ready", each=1, lately=True)

    def clear(self, name: str) -> None:
        """Remove the runs of that name."""
        self._put("DELETE FROM run WHERE workflow = :name", name=name)

    def measure(self, of: str, count: int, rounds: int) -> Iterator[Figure]:
        """Every job as it is now."""
        for statement in ("VACUUM ANALYZE run", "VACUUM ANALYZE step", "ANALYZE attempt", "ANALYZE fan_out"):
            with self.database.engine.connect() as connection:
                connection.execute(text(statement))
        for name, job in self.jobs.items():
            job()
            taken = []
            before = self._total()
            for _ in range(rounds):
                began = time.perf_counter()
                job()
                taken.append(time.perf_counter() - began)
            yield Figure(name, of, count, statistics.median(taken) * 1000, (self._total() - before) // rounds)

    def _put(self, statement: str, **values: object) -> None:
        with self.database.work() as work:
            work.run(text(statement), values)

    def _total(self) -> int:
        with self.database.work() as work:
            work.run(text("SELECT pg_stat_force_next_flush()"))
        with self.database.work() as work:
            total: int = work.rows(_READ)[0].total
        return total


@contextmanager
def site() -> Iterator[Site]:
    """Embedded servers below a temporary directory, and the fleet on them."""
    with servers() as (made, _):
        assert made.postgres is not None
        assert made.valkey is not None
        database = Database(made.postgres.url, pool_size=1)
        with database.work() as work:
            work.run(text("INSERT INTO definition (sha256, document) VALUES ('kept', '{}')"))
        publisher = CeleryPublisher(celery_app(made.valkey.url, BrokerSettings()), made.valkey.url)
        runs = Runs(database, publisher, RunPolicy(timedelta(seconds=15), max_worker_losses=3, chance=lambda: 0.5))
        try:
            yield Site(database, runs)
        finally:
            publisher.close()
            database.close()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 10^4 items and 10^5 steps, three rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    log.configure(LogSettings(level="error"))
    items = (1_000, 10_000) if given.quick else (1_000, 10_000, 100_000)
    kept = (1_000, 100_000) if given.quick else (1_000, 100_000, 1_000_000)
    rounds = 3 if given.quick else ROUNDS
    figures: list[Figure] = []
    with site() as at:
        there = 0
        for count in kept:
            at.keep_ended(count - there)
            there = count
            figures += at.measure("steps kept", count, rounds)
        for count in items:
            at.put_map(count)
            figures += at.measure("items that wait", count, rounds)
        at.clear("map")
        for count in items:
            at.put_ready(count)
            figures += at.measure("steps ready", count, rounds)
    _print(figures)
    if given.json is not None:
        machine = {"processor": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        given.json.write_text(json.dumps({"machine": machine, "figures": [asdict(one) for one in figures]}, indent=1))


def _print(figures: list[Figure]) -> None:
    for of in dict.fromkeys(figure.of for figure in figures):
        counts = sorted({figure.count for figure in figures if figure.of == of})
        table = Table("job", *(f"{count:,} {of}" for count in counts))
        for job in dict.fromkeys(figure.job for figure in figures):
            found = {figure.count: figure for figure in figures if (figure.job, figure.of) == (job, of)}
            table.add_row(job, *(f"{found[count].ms:.1f} ms, {found[count].rows:,} rows" for count in counts))
        Console().print(table)


if __name__ == "__main__":
    main()
