"""
What the timed jobs on runs cost, by how much waits and how much is kept:
`python -m benchmarks.growth_runs [--json FILE] [--sizes 1000:10000,10000:100000,100000:1000000]`.

An embedded Postgres is filled with runs that wait (so many steps each of those that are held, delayed, awaited and
ready, a tenth of them blocked runs), none of which is overdue, and with finished steps that are kept. Then each job
runs a few times as a control worker would run it. Nothing is due: what is measured is what each second costs for ever.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Text, bindparam, text

from app.kernel import broker, embedded
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.servers import BrokerSettings
from app.workflows import retention
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.recovery.overdue import SweepCursor
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.runs.service import Runs
from app.workflows.schedules.service import Schedules

_MAKE = text("""
    WITH made AS (
        INSERT INTO run (id, workflow, sha256, state, paused, workflow_paused, priority, rank, inputs, depth,
                         retention_s, concurrency_key, started_at, finished_at, expires_at, deadline_at)
        SELECT md5(:name || n)::uuid, :name, 'sha', :run_state, false, false, 'standard', 1, '{}', 0, 3600,
               CASE WHEN :key <> '' THEN :key || n END, now(),
               CASE WHEN :final THEN now() END, CASE WHEN :final THEN now() + interval '30 d' END,
               now() + interval '1 d'
        FROM generate_series(1, :runs) AS n RETURNING id
    )
    INSERT INTO step (id, run_id, key, position, kind, model_index, queue, priority, rank, state, delegated, attempt,
                      failures, losses, tokens_in, tokens_out, owner, lease_until, not_before, published_at,
                      deadline_at, finished_at)
    SELECT gen_random_uuid(), id, 's' || n, n, 'wait', 0, 'io', 'standard', 1, :state, :delegated, 1, 0, 0, 0, 0,
           CASE WHEN :state = 'running' THEN 'w' END,
           CASE WHEN :state = 'running' THEN now() + interval '1 h' END,
           CASE WHEN :state IN ('waiting', 'awaiting') THEN now() + interval '1 h' END,
           CASE WHEN :state = 'ready' THEN now() END, now() + interval '1 d', CASE WHEN :final THEN now() END
    FROM made, generate_series(1, :steps) AS n
""").bindparams(*(bindparam(name, type_=Text()) for name in ("name", "state", "run_state", "key")))


_MAKE_SCHEDULES = text("""
    WITH made AS (
        INSERT INTO schedule (id, name, document, decided_to, next_at)
        SELECT gen_random_uuid(), :name || n, '{}', now(), now() + interval '1 d'
        FROM generate_series(1, :schedules) AS n RETURNING id
    )
    INSERT INTO schedule_fire (id, schedule_id, at, by_hand, due_at, state, open)
    SELECT gen_random_uuid(), id, now() - n * interval '1 min', false, now(), 'fired', false
    FROM made, generate_series(1, :fires) AS n
""").bindparams(bindparam("name", type_=Text()))


def make(
    database: Database, name: str, state: str, runs: int, steps: int, run_state: str = "running", key: str = ""
) -> None:
    """Runs with steps in a state, none of which is overdue."""
    final = run_state == "succeeded"
    values = {"name": name, "state": state, "run_state": run_state, "runs": runs, "steps": steps, "final": final}
    values["key"] = key
    with database.work() as work:
        work.run(text("INSERT INTO definition (sha256, document) VALUES ('sha', '{}') ON CONFLICT DO NOTHING"))
        work.run(_MAKE, values | {"delegated": state == "awaiting"})


def fill(database: Database, waiting: int, kept: int) -> None:
    """So many of each kind that waits, and so many finished steps."""
    for state in ("running", "waiting", "awaiting", "ready"):
        key = f"key-{waiting}-" if state == "running" else ""
        make(database, f"{state}-{waiting}", state, waiting // 10, 10, key=key)
    make(database, f"blocked-{waiting}", "pending", waiting // 10, 1, "blocked", f"key-{waiting}-")
    make(database, f"kept-{kept}", "succeeded", kept // 20, 20, "succeeded")
    with database.work() as work:
        values = {"name": f"s-{waiting}-", "schedules": waiting // 10, "fires": kept // waiting * 10}
        work.run(_MAKE_SCHEDULES, values)
        work.run(text("ANALYZE"))


def jobs() -> dict[str, Callable[[Runs], object]]:
    """Each timed job on runs, as a control worker runs it."""
    cursor = SweepCursor()
    return {
        "sweep": lambda runs: sweep(runs, republish_after=timedelta(hours=1), cursor=cursor),
        "expiry": lambda runs: retention.remove_runs(runs.database),
        "schedules": lambda runs: Schedules(runs, timedelta(days=1)).advance_all(),
    }


def measure(runs: Runs, rounds: int) -> dict[str, float]:
    """The median milliseconds of each job; the first round is thrown away."""
    taken: dict[str, list[float]] = {}
    for job, run in jobs().items():
        for _ in range(rounds + 1):
            began = time.perf_counter()
            run(runs)
            taken.setdefault(job, []).append((time.perf_counter() - began) * 1000)
    return {job: round(statistics.median(each[1:]), 1) for job, each in taken.items()}


def main() -> None:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="1000:10000,10000:100000,100000:1000000")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = []
    now = datetime.now(UTC)
    with (
        tempfile.TemporaryDirectory() as folder,
        embedded.DataDirectory(Path(folder), now=now, command="growth_runs") as held,
        embedded.started(held) as servers,
    ):
        assert servers.postgres is not None
        assert servers.valkey is not None
        database = Database(servers.postgres.url, pool_size=4)
        database.upgrade()
        url = servers.valkey.url
        publisher = CeleryPublisher(broker.celery_app(url, BrokerSettings()), url)
        runs = Runs(database, publisher, RunPolicy(timedelta(seconds=15), max_worker_losses=3))
        print("| waiting, of each kind | kept | " + " | ".join(f"{job}, ms" for job in jobs()) + " |")
        print("|---|---|" + "---|" * len(jobs()))
        for size in asked.sizes.split(","):
            waiting, kept = map(int, size.split(":"))
            fill(database, waiting, kept)
            taken = measure(runs, asked.rounds)
            found.append({"waiting": waiting, "kept": kept, "ms": taken})
            print(f"| {waiting:,} | {kept:,} | " + " | ".join(map(str, taken.values())) + " |", flush=True)
        database.close()
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
