"""
Scale: what each part costs by how much there is of it, up to what this machine holds, with the exponents.

- `runs`: runs that ended and are kept, each a copy of one that really ran, of three steps that ask a model. What a
  submission, a step, the lists, the timed jobs and a removal take, and the bytes of each table.
- `fleet`: hosts of eight devices, each with a pool that serves. What a heartbeat of an agent and of a pool, a pass of
  the planner and the fleet's view take.
- `traffic`: a whole installation with a simulated model: connections of each program to Postgres and Valkey, and
  statements, messages and bytes for each run.

`python -m benchmarks.scale [runs|fleet|traffic]… [--quick] [--full] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import psutil
import psycopg
import redis
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from app.catalog import files
from app.catalog.model import Model
from app.devices.device import HardwareKind, MeasuredDevice
from app.fleet import views as fleet_views
from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.hosts import DeviceReport, Hosts
from app.fleet.ledger import rules, session
from app.fleet.ledger.reservation import ReservationRequest
from app.fleet.pool import PoolPhase
from app.footprint.layout import KnownLayout
from app.inference import demand
from app.kernel import embedded, ids, log
from app.kernel.broker import CeleryPublisher, celery_app
from app.kernel.database import Database
from app.kernel.sections.servers import BrokerSettings, LogSettings
from app.scheduler import needs, reconcile
from app.scheduler.reconcile_pass import ReconcileTimes
from app.workflows import retention
from app.workflows.language.definition import Definition
from app.workflows.runs import views
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.outcomes import Success, TokenUsage
from benchmarks import installations
from benchmarks.steps import servers

MODEL = "smollm2:135m"
WORKER = "w@scale/1/x"
#: Times that each thing is done for a figure.
ROUNDS = 25
#: Runs that really run, and are copied.
TEMPLATES = 20
#: Runs whose removal is measured.
REMOVED = 500
LEASE = timedelta(hours=1)
TIMES = ReconcileTimes(timedelta(seconds=30), timedelta(seconds=20), timedelta(minutes=2))
#: Devices of a host, and bytes of each.
DEVICES, CAPACITY = 8, 80 * 10**9
#: Heartbeats for a figure of processor time.
HEARTBEATS = 200
#: The runs that the installation does.
TRAFFIC = 400

WORKFLOW = Definition.model_validate(
    {
        "workflow": "scale",
        "inputs": {"text": {"type": "string"}},
        "defaults": {"model": MODEL},
        "steps": [
            {"id": "read", "kind": "generate", "prompt": "Read: {{ inputs.text }}", "max_tokens": 20},
            {"id": "judge", "kind": "generate", "prompt": "Judge: {{ steps.read.output }}", "needs": ["read"]},
            {"id": "answer", "kind": "generate", "prompt": "Answer: {{ steps.judge.output }}", "needs": ["judge"]},
        ],
    }
)
INPUTS = {"text": "Where is my parcel? It was sent nine days ago. " * 8}
OUTPUT = "The parcel was sent nine days ago and has not arrived; the customer asks where it is. " * 3

#: The instant that a copy was made at: spread over the last thirty days.
_AT = "now() - interval '30 days' * (1 - n::float / :copies)"
#: A UUID of version 7 of an instant.
_ID = """
    (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(md5(random()::text), 1, 3)
    || '8' || substr(md5(random()::text), 1, 15))::uuid
"""
_RUN_COPIES = f"""
    CREATE TEMP TABLE run_copy AS
    SELECT old, {_ID} AS id, at FROM (
        SELECT (:templates)[1 + n % cardinality(:templates)] AS old, {_AT} AS at FROM generate_series(1, :copies) AS n
    ) AS made ORDER BY at
"""
_STEP_COPIES = f"""
    CREATE TEMP TABLE step_copy AS
    SELECT step.id AS old, {_ID} AS id, run_copy.id AS run_id, at
    FROM run_copy JOIN step ON step.run_id = run_copy.old ORDER BY at, step.position
"""
#: What a copy has of its own, by table; and how it finds the row that it copies.
_OWN: Mapping[str, Mapping[str, str]] = {
    "run": {"id": "c.id", "expires_at": "at + interval '31 days'", "labels": "jsonb_build_object('customer', n % 997)"},
    "step": {"id": "c.id", "run_id": "c.run_id"},
    "attempt": {"step_id": "c.id"},
    "history": {"run_id": "c.id"},
}
_FROM = {
    "run": "(SELECT *, row_number() OVER () AS n FROM run_copy) AS c JOIN run AS old ON old.id = c.old",
    "step": "step_copy AS c JOIN step AS old ON old.id = c.old",
    "attempt": "step_copy AS c JOIN attempt AS old ON old.step_id = c.old",
    "history": "run_copy AS c JOIN history AS old ON old.run_id = c.old",
}
#: Instants of a copy are moved by as much as its own.
_INSTANTS = {"created_at", "started_at", "finished_at", "ready_at", "published_at", "at", "lease_until"}
_COLUMNS = "SELECT column_name AS name FROM information_schema.columns WHERE table_name = :table AND is_identity = 'NO'"
_BYTES = (
    "SELECT pg_total_relation_size(CAST(:table AS regclass)) AS bytes, pg_indexes_size(CAST(:table AS regclass)) AS i"
)
_TABLES = tuple(_OWN)


@dataclass(frozen=True, slots=True)
class Figure:
    """What one thing costs at one size."""

    part: str
    of: str
    count: int
    #: Median, in `unit`.
    value: float
    unit: str = "ms"


def median_ms(act: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median milliseconds of `act`; it is done once before."""
    act()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of the line through the logarithms: 0 is flat, 1 is linear."""
    xs, ys = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    middle_x, middle_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    return sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / spread


@contextmanager
def site() -> Iterator[Runs]:
    """Embedded servers on temporary data."""
    with servers() as (made, _):
        assert made.postgres is not None
        assert made.valkey is not None
        database = Database(made.postgres.url, pool_size=2)
        publisher = CeleryPublisher(celery_app(made.valkey.url, BrokerSettings()), made.valkey.url)
        try:
            yield Runs(database, publisher, RunPolicy(timedelta(seconds=15), max_worker_losses=3, chance=lambda: 0.5))
        finally:
            publisher.close()
            database.close()


# Runs that are kept


class Kept:
    """A database with runs that have ended."""

    def __init__(self, runs: Runs) -> None:
        """Let the runs run that are copied."""
        self.runs, self.database = runs, runs.database
        self.templates = [self.run_one() for _ in range(TEMPLATES)]
        self.count = 0

    def submit(self) -> UUID:
        """Submit one."""
        return self.runs.submit(Submission(WORKFLOW, dict(INPUTS), labels={"customer": "new"})).id

    def run_one(self) -> UUID:
        """Submit one and do its steps, as workers would."""
        run_id = self.submit()
        for step in ("read", "judge", "answer"):
            self.do(run_id, step)
        return run_id

    def do(self, run_id: UUID, key: str) -> None:
        """Claim a step and record its outcome."""
        row = next(step for step in views.run(self.database, run_id).steps if step.key == key)
        self.take(row.id, row.attempt)

    def take(self, step_id: UUID, attempt: int) -> None:
        """Claim a step and record its outcome."""
        claim = self.runs.claim(step_id, attempt, WORKER)
        assert claim is not None
        self.runs.succeed(claim, WORKER, Success(OUTPUT, TokenUsage(120, 60, 30, timedelta(seconds=0.2))))

    def ready(self) -> list[tuple[UUID, int]]:
        """New runs whose first step is ready: the step and its attempt."""
        found = [views.run(self.database, self.submit()).steps[0] for _ in range(ROUNDS + 1)]
        return [(step.id, step.attempt) for step in found]

    def keep(self, count: int) -> None:
        """Have so many kept runs: copies of those that ran."""
        copies = count - self.count
        with self.database.work() as work:
            values = {"templates": self.templates, "copies": copies}
            work.run(text(_RUN_COPIES), values)
            work.run(text(_STEP_COPIES))
            for table in _TABLES:
                work.run(text(self._copy(table)))
            work.run(text("DROP TABLE run_copy, step_copy"))
        with self.database.engine.connect() as connection:
            connection.execute(text(f"VACUUM (ANALYZE) {', '.join(_TABLES)}"))
        self.count = count

    def _copy(self, table: str) -> str:
        with self.database.work() as work:
            names = [row.name for row in work.rows(text(_COLUMNS), {"table": table})]
        own = _OWN[table]
        taken = []
        for name in names:
            if name in own:
                taken.append(own[name])
            elif name in _INSTANTS:
                taken.append(f"old.{name} - (SELECT max(created_at) FROM run WHERE id = ANY(:templates)) + c.at")
            else:
                taken.append(f"old.{name}")
        given = ", ".join(f"'{one}'" for one in self.templates)
        statement = (
            f"INSERT INTO {table} ({', '.join(names)}) SELECT {', '.join(taken)} FROM {_FROM[table]} ORDER BY c.at"
        )
        return statement.replace(":templates", f"ARRAY[{given}]::uuid[]")

    def measure(self, rounds: int = ROUNDS) -> Iterator[Figure]:
        """What things take now."""
        ready = self.ready()
        some = self.some_run()
        acts: dict[str, Callable[[], object]] = {
            "submission of three steps": self.submit,
            "claim and record of a step": lambda: self.take(*ready.pop()),
            "one run, shown": lambda: views.run(self.database, some),
            "newest 50 runs": lambda: views.page(self.database, limit=50),
            "newest 50 of a label": lambda: views.page(self.database, limit=50, labels={"customer": "17"}),
            "newest 50 that failed": lambda: views.page(self.database, limit=50, states=["failed"]),
            "sweep": lambda: sweep(self.runs, republish_after=timedelta(hours=1)),
            "demand": lambda: demand.observe(self.database, files.read_catalog(), []),
        }
        for name, act in acts.items():
            yield Figure(name, "runs kept", self.count, median_ms(act, rounds))
        yield Figure("removal of a run", "runs kept", self.count, self.removal())
        for table in _TABLES:
            yield from self.sizes(table)
        with self.database.work() as work:
            work.run(text("DELETE FROM run WHERE finished_at IS NULL"))

    def some_run(self) -> UUID:
        """A kept run from the middle."""
        with self.database.work() as work:
            found: UUID = work.rows(text("SELECT id FROM run ORDER BY id LIMIT 1 OFFSET :n"), {"n": self.count // 2})[
                0
            ].id
        return found

    def removal(self) -> float:
        """Milliseconds for a run that is removed with others, after its retention, with its share of flushes."""
        with self.database.work() as work:
            statement = """
                UPDATE run SET expires_at = now() - interval '1 s'
                WHERE id = ANY(ARRAY(SELECT id FROM run WHERE id <> ALL(:templates) ORDER BY id LIMIT :count))
            """
            work.run(text(statement), {"templates": self.templates, "count": REMOVED})
        began = time.perf_counter()
        removed = retention.remove_runs(self.database)
        taken = time.perf_counter() - began
        assert removed == REMOVED, removed
        self.count -= removed
        return taken * 1000 / removed

    def sizes(self, table: str) -> Iterator[Figure]:
        """The bytes of a table for each kept run, and the part of its indexes."""
        with self.database.work() as work:
            row = work.rows(text(_BYTES), {"table": table})[0]
        yield Figure(f"{table}, bytes for a run", "runs kept", self.count, row.bytes / self.count, "bytes")


def measure_runs(sizes: Sequence[int]) -> Iterator[Figure]:
    """The figures of kept runs."""
    with site() as runs:
        kept = Kept(runs)
        for size in sizes:
            kept.keep(size)
            for figure in kept.measure():
                yield Figure(figure.part, figure.of, size, figure.value, figure.unit)


# Hosts


class Fleet:
    """Hosts whose devices each have a pool that serves."""

    def __init__(self, database: Database) -> None:
        self.database, self.catalog = database, files.read_catalog()
        self.hosts, self.holder = Hosts(database, LEASE, LEASE), ReservationHolder(database, LEASE)
        #: The agents' epochs by host, and the pools with the epochs of their grants.
        self.agents: dict[str, int] = {}
        self.pools: list[tuple[str, int]] = []
        self.models: list[Model] = list(self.catalog.models)
        known = (
            KnownLayout(needs.configuration_id(model), "H100", (10**9,), "catalogue", timedelta(seconds=1), 10.0)
            for model in self.models
        )
        self.hosts.declare_layouts(known)

    def grow(self, count: int) -> None:
        """Have so many hosts."""
        files_ = [needs.configuration_id(model) for model in self.models]
        for number in range(len(self.agents), count):
            host = f"host-{number:04}"
            self.agents[host] = self.hosts.join(host, host, 64, self.reports(host), {})
            self.hosts.heartbeat(host, self.agents[host], [], files_, [])
            for device in range(DEVICES):
                self.serve(host, f"{host}/gpu-{device}", self.models[(number + device) % len(self.models)])
        with self.database.engine.connect() as connection:
            connection.execute(
                text("VACUUM (ANALYZE) host, device, reservation, reservation_device, pool, pool_report")
            )

    def reports(self, host: str) -> list[DeviceReport]:
        """What an agent tells of its devices."""
        found = []
        for number in range(DEVICES):
            measured = MeasuredDevice(
                f"gpu-{number}", HardwareKind.GPU, "H100", CAPACITY, CAPACITY, uuid=f"GPU-{host}-{number}"
            )
            found.append(DeviceReport(f"{host}/gpu-{number}", "H100", CAPACITY, measured, 0))
        return found

    def serve(self, host: str, device: str, model: Model) -> None:
        """Grant a pool, and let it serve: as the planner, the agent and the pool do."""
        configuration, id_ = needs.configuration_id(model), str(ids.new_id())
        with self.database.work() as work:
            open_ = session.open_session(work, host)
            until = open_.now + LEASE
            claim = ReservationRequest(
                id_, session.next_epoch(work), host, configuration, {device: 10**9}, until, frozenset()
            )
            refused = open_.change(lambda found: rules.claim(found, claim))
            assert refused is None, refused
            open_.write()
            insert = """
                INSERT INTO pool (id, configuration, model, slots, purpose, reason, desired, estimate_seconds)
                VALUES (CAST(:id AS uuid), :configuration, :model, 8, 'demand', 'steps wait', 'run', 0)
            """
            work.run(text(insert), {"id": id_, "configuration": configuration, "model": model.name})
        self.hosts.activate(host, self.agents[host], id_, 8)
        epoch = next(pool.epoch for pool in self.hosts.pools(host) if pool.id == id_)
        self.holder.take(id_, epoch)
        self.pools.append((id_, epoch))
        self.renew(id_, epoch)

    def renew(self, id_: str, epoch: int) -> None:
        """A heartbeat of a pool that serves and works."""
        self.holder.renew(id_, epoch, HeartbeatReport(PoolPhase.SERVING, 1.0, worker=f"pool@{id_}", busy=0))

    def renew_anew(self) -> None:
        """A heartbeat of a pool that has closed its connection since the last one."""
        database = Database(self.database.url, pool_size=1)
        id_, epoch = self.pools[0]
        report = HeartbeatReport(PoolPhase.SERVING, 1.0, worker=f"pool@{id_}", busy=0)
        ReservationHolder(database, LEASE).renew(id_, epoch, report)
        database.close()

    def plan(self) -> None:
        """A pass of the planner."""
        done = reconcile.reconcile(self.database, lambda work: demand.read(work, self.catalog, []), TIMES)
        assert done is not None

    def measure(self) -> Iterator[Figure]:
        """What things take now."""
        host, epoch = next(iter(self.agents.items()))
        reports = self.reports(host)
        acts: dict[str, Callable[[], object]] = {
            "heartbeat of an agent, 8 devices": lambda: self.hosts.heartbeat(host, epoch, reports, [], []),
            "heartbeat of a pool": lambda: self.renew(*self.pools[0]),
            "pass of the planner": self.plan,
            "the fleet, shown": lambda: fleet_views.fleet(self.database),
        }
        for name, act in acts.items():
            yield Figure(name, "hosts", len(self.agents), median_ms(act, 7))
        for name, act in {
            "on a kept connection": lambda: self.renew(*self.pools[0]),
            "on a new one": self.renew_anew,
        }.items():
            before = postgres_seconds(psutil.Process())
            for _ in range(HEARTBEATS):
                act()
            taken = postgres_seconds(psutil.Process()) - before
            part = f"heartbeat of a pool {name}: processor time of Postgres"
            yield Figure(part, "hosts", len(self.agents), taken / HEARTBEATS * 1000)


def measure_fleet(sizes: Sequence[int]) -> Iterator[Figure]:
    """The figures of hosts."""
    with site() as runs:
        fleet = Fleet(runs.database)
        for size in sizes:
            fleet.grow(size)
            yield from fleet.measure()


# A whole installation

_SIMULATED = "simulated:1"
_CATALOG = f"""
[[models]]
name = "{_SIMULATED}"
use_cases = ["chat"]
source = {{ path = "/nowhere/simulated.gguf" }}
simulated = {{ bytes = "100MiB", load = "1ms", tokens_per_second = 10000 }}
"""


def measure_traffic(count: int) -> Iterator[Figure]:
    """What an installation keeps open, and what it sends for each run."""
    gpu = """fleet.simulated=[{"name": "sim-0", "bytes": "1GiB"}]"""
    options = [gpu, f'pools.models=["{_SIMULATED}"]', "serving.resident=[]"]
    with installations.up(threads=1, slots=8, context=2048, options=options, catalog=_CATALOG) as up:
        wait_for(up.url, submit(up.url, 8))
        yield from connections(up)
        before, at_work = counters(up), cpu(up)
        wait_for(up.url, submit(up.url, count))
        time.sleep(1.5)  # reports of tokens are written once a second
        after, worked = counters(up), cpu(up)
        for name in sorted(after):
            yield Figure(name, "one run", 1, (after[name] - before[name]) / count, "for a run")
        for name in sorted(worked):
            yield Figure(f"processor time, {name}", "one run", 1, (worked[name] - at_work.get(name, 0)) / count * 1000)


def submit(url: str, count: int) -> list[str]:
    """Submit runs over HTTP, and return their ids."""
    definition = WORKFLOW.model_dump(mode="json", exclude_unset=True) | {"defaults": {"model": _SIMULATED}}
    body = {"definition": definition, "inputs": INPUTS}
    with httpx2.Client(base_url=url, timeout=60) as client:
        return [str(client.post("/v1/runs", json=body).raise_for_status().json()["id"]) for _ in range(count)]


def wait_for(url: str, runs: Sequence[str]) -> None:
    """Wait until all have ended well."""
    with httpx2.Client(base_url=url, timeout=60) as client:
        for run in runs:
            while (state := client.get(f"/v1/runs/{run}").json()["state"]) != "succeeded":
                assert state in ("queued", "running"), state
                time.sleep(0.1)


def addresses(up: installations.Up) -> tuple[str, str]:
    """The URLs of its Postgres and Valkey."""
    postgres, valkey = embedded.find_postgres_url(up.data), embedded.find_valkey_url(up.data)
    assert postgres is not None
    assert valkey is not None
    return postgres, valkey


def connections(up: installations.Up) -> Iterator[Figure]:
    """Connections of each program, by where they end."""
    ports = {httpx2.URL(url).port: name for url, name in zip(addresses(up), ("Postgres", "Valkey"), strict=True)}
    found: Counter[tuple[str, str]] = Counter()
    for name, process in up.processes().items():
        with suppress(psutil.Error):
            for one in process.net_connections("tcp"):
                if one.raddr and one.raddr.port in ports:
                    found[name, ports[one.raddr.port]] += 1
    for (name, server), count in sorted(found.items()):
        yield Figure(f"connections, {name} to {server}", "program", 1, count, "")


def counters(up: installations.Up) -> dict[str, float]:
    """What the servers count."""
    postgres, valkey = addresses(up)
    with psycopg.connect(postgres) as connection:
        row = connection.execute(
            "SELECT xact_commit, tup_inserted, tup_updated, (SELECT wal_bytes FROM pg_stat_wal) FROM pg_stat_database"
            " WHERE datname = current_database()"
        ).fetchone()
    assert row is not None
    client = redis.Redis.from_url(valkey)
    info: Any = client.info()
    client.close()
    names = ("Postgres: transactions", "Postgres: rows inserted", "Postgres: rows updated", "Postgres: bytes of WAL")
    found = {name: float(value) for name, value in zip(names, row, strict=True)}
    found["Valkey: commands"] = float(info["total_commands_processed"])
    found["Valkey: bytes in"] = float(info["total_net_input_bytes"])
    found["Valkey: bytes out"] = float(info["total_net_output_bytes"])
    return found


def cpu(up: installations.Up) -> dict[str, float]:
    """Seconds of processor time of each program, and of all processes of Postgres."""
    found: dict[str, float] = {}
    for name, process in up.processes().items():
        with suppress(psutil.Error):
            found[name] = sum(process.cpu_times()[:2])
    found["postgres"] = postgres_seconds(psutil.Process(up.process.pid))
    return found


def postgres_seconds(root: psutil.Process) -> float:
    """Seconds of processor time of all processes of Postgres below another one, those that have ended too."""
    total = 0.0
    for process in root.children(recursive=True):
        with suppress(psutil.Error):
            if process.name() == "postgres":
                times = process.cpu_times()
                is_first = (parent := process.parent()) is None or parent.name() != "postgres"
                total += times.user + times.system + (times.children_user + times.children_system if is_first else 0)
    return total


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="runs|fleet|traffic", help="by default all")
    parser.add_argument("--quick", action="store_true", help="up to 10^5 runs and 100 hosts")
    parser.add_argument("--full", action="store_true", help="up to 3 * 10^6 runs: half an hour, 30 GB of disk")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    parts = given.parts or ["runs", "fleet", "traffic"]
    if unknown := set(parts) - {"runs", "fleet", "traffic"}:
        parser.error(f"there is no part {sorted(unknown)}; there are runs, fleet and traffic")
    log.configure(LogSettings(level="error"))
    sizes = [1_000, 10_000, 100_000] + ([] if given.quick else [1_000_000]) + ([3_000_000] if given.full else [])
    hosts = (1, 10, 100) if given.quick else (1, 10, 100, 1_000)
    load = os.getloadavg()[0]
    figures: list[Figure] = []
    made: dict[str, Callable[[], Iterator[Figure]]] = {
        "runs": lambda: measure_runs(sizes),
        "fleet": lambda: measure_fleet(hosts),
        "traffic": lambda: measure_traffic(TRAFFIC // 4 if given.quick else TRAFFIC),
    }
    for part in parts:
        found = list(made[part]())
        figures += found
        show(found)
    if given.json is not None:
        machine = {"cores": os.cpu_count(), "load": load}
        given.json.write_text(json.dumps({"machine": machine, "figures": [asdict(one) for one in figures]}, indent=1))


def show(figures: Sequence[Figure]) -> None:
    """Print a table of a part."""
    of = figures[0].of
    counts = sorted({figure.count for figure in figures})
    many = len(counts) > 1
    table = Table("", *(f"{count:,} {of}" for count in counts) if many else ("each",), *(("exponent",) if many else ()))
    for part in dict.fromkeys(figure.part for figure in figures):
        found = {figure.count: figure for figure in figures if figure.part == part}
        cells = [f"{found[count].value:,.2f} {found[count].unit}" for count in counts]
        if many:
            last = counts[-3:]
            cells.append(f"{exponent(last, [found[count].value for count in last]):.2f}")
        table.add_row(part, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
