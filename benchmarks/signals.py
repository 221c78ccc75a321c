"""
Signals and rules, by how much is kept: `python -m benchmarks.signals [--steps 10000,100000,1000000] [--json FILE]`.

An embedded Postgres is filled with so many steps that have ended over the last thirty days, and with hours of signals
of 1,600 series. For each size: the evaluation of all rules (the built-in ones and forty-five more, by model, pool and
namespace, over five minutes, an hour and a day), and a pass of the readers with nothing new and with 5,000 new
attempts. Then the time of roll-ups by the points that they add up, and the exponent of time over points.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import text

from app.api.telemetry import governance as telemetry
from app.fleet import views
from app.governance.rules import service
from app.governance.rules.evaluator import RuleEvaluator
from app.governance.rules.service import RuleService
from app.governance.signals.readers import Readers
from app.governance.signals.rollup import roll_up
from app.inference import backlog
from app.kernel import embedded
from app.kernel.database import Database, UnitOfWork
from app.workflows.language.source import SourceDocument

#: Series of each signal with points: so many models, pools and namespaces.
MODELS, POOLS, NAMESPACES = 10, 20, 20

_RUNS = text("""
    INSERT INTO run (id, workflow, sha256, state, paused, workflow_paused, priority, rank, inputs, depth, retention_s,
                     namespace, created_at, started_at, finished_at)
    SELECT md5('run' || n)::uuid, 'w', 'sha', 'succeeded', false, false, 'standard', 1, '{}', 0, 3600,
           'ns' || n % :namespaces, past, past, past
    FROM (
        SELECT n, now() - random() * interval '30 days' AS past FROM generate_series(CAST(:first AS int), :last) AS n
    ) AS made
""")
_STEPS = text("""
    INSERT INTO step (id, run_id, key, position, kind, model, model_index, queue, priority, rank, state, delegated,
                      attempt, failures, losses, tokens_in, tokens_out, ready_at, started_at, finished_at)
    SELECT md5('step' || n || '.' || m)::uuid, md5('run' || n)::uuid, 's' || m, m, 'generate', 'm' || n % :models, 0,
           'q', 'standard', 1, 'succeeded', false, 1, 0, 0, 9, 9, run.finished_at, run.finished_at, run.finished_at
    FROM generate_series(CAST(:first AS int), :last) AS n JOIN run ON run.id = md5('run' || n)::uuid,
         generate_series(0, 9) AS m
""")
_ATTEMPTS = text("""
    INSERT INTO attempt (step_id, attempt, owner, model, started_at, finished_at, outcome, tokens_in, tokens_out)
    SELECT step.id, 1, 'pool@h/1/p', step.model, step.started_at, step.finished_at, 'succeeded', 9, 9
    FROM generate_series(CAST(:first AS int), :last) AS n, generate_series(0, 9) AS m
    JOIN LATERAL (SELECT * FROM step WHERE id = md5('step' || n || '.' || m)::uuid) AS step ON true
""")
_SERIES = text("""
    INSERT INTO signal_series (signal, model, pool, namespace)
    SELECT signal, 'm' || pool % :models, 'p' || pool, 'ns' || namespace
    FROM unnest(ARRAY['error_rate', 'response_time', 'tokens', 'queue_wait']) AS signal,
         generate_series(1, CAST(:pools AS int)) AS pool, generate_series(1, CAST(:namespaces AS int)) AS namespace
    ON CONFLICT DO NOTHING
""")
_POINTS = text("""
    INSERT INTO signal_point (series_id, resolution, at, observations, weight, total, least, greatest, histogram)
    SELECT id, 1, date_trunc('minute', now()) - m * interval '1 minute', 10, 10, 1, 0, 1,
           CASE WHEN signal IN ('response_time', 'queue_wait') THEN '{"0": 6, "4": 3, "9": 1}'::jsonb END
    FROM signal_series, generate_series(0, CAST(:minutes AS int)) AS m
    ON CONFLICT DO NOTHING
""")
_NEW = text("UPDATE attempt SET finished_at = now() WHERE step_id IN (SELECT step_id FROM attempt LIMIT 5000)")


def fill_points(work: UnitOfWork, minutes: int) -> None:
    """Series of four signals, with a point for each of the last minutes."""
    work.run(_SERIES, {"models": MODELS, "pools": POOLS, "namespaces": NAMESPACES})
    work.run(_POINTS, {"minutes": minutes})


def rules(database: Database) -> None:
    """The built-in rules, and forty-five more."""
    service.ensure_builtin(database)
    stored = RuleService(database, 200)
    for number in range(45):
        condition: dict[str, Any] = {"window": ("5m", "1h", "24h")[number % 3]}
        if number % 5:
            signal = ("error_rate", "response_time", "queue_wait")[number % 3]
            condition |= {"signal": signal, "operator": ">", "threshold": 0.9 if signal == "error_rate" else 900}
        else:
            condition["expression"] = "signals.error_rate.mean > 10.0 * previous.error_rate.mean"
        document = {
            "rule": f"r{number}",
            "category": "performance",
            "all": [condition],
            "by": ("model", "pool", "namespace")[number // 15],
        }
        stored.put(stored.parse(SourceDocument(document, {})), "benchmark")


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """The median of the milliseconds; the first round is thrown away."""
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        taken.append((time.perf_counter() - began) * 1000)
    return round(statistics.median(taken[1:]), 1)


def read_metrics(database: Database) -> None:
    """What `/metrics` of the API reads from Postgres."""
    views.fleet(database)
    backlog.read(database)
    telemetry.read(database)


def measure(database: Database, rounds: int) -> dict[str, float]:
    """Evaluate and read."""
    evaluator = RuleEvaluator(database, (), timedelta(minutes=5))
    readers = Readers(database, timedelta(seconds=10))
    readers.attempts()
    found = {
        "evaluation, ms": median_ms(evaluator.decide_all, rounds),
        "readers, nothing new, ms": median_ms(readers.attempts, rounds),
        "/metrics, ms": median_ms(lambda: read_metrics(database), rounds),
    }
    with database.work() as work:
        work.run(_NEW)
    began = time.perf_counter()
    read = readers.attempts()
    found[f"readers, {read} attempts, ms"] = round((time.perf_counter() - began) * 1000, 1)
    return found


def measure_roll_ups(database: Database, minutes: list[int]) -> list[tuple[int, float]]:
    """By minutes of history: points that are added up, and the seconds that it takes."""
    found = []
    for length in minutes:
        with database.work() as work:
            work.run(text("TRUNCATE signal_point, signal_watermark"))
            work.run(_POINTS, {"minutes": length})
            work.run(text("ANALYZE signal_point"))
            points = work.rows(text("SELECT count(*) AS n FROM signal_point"))[0].n
        began = time.perf_counter()
        roll_up(database, lambda: True)
        found.append((points, round(time.perf_counter() - began, 2)))
    return found


def main() -> None:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", default="10000,100000,1000000")
    parser.add_argument("--minutes", default="240,480,960")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found: dict[str, Any] = {"by steps": [], "roll-ups": []}
    minutes = [int(one) for one in asked.minutes.split(",")]
    with (
        tempfile.TemporaryDirectory() as folder,
        embedded.DataDirectory(Path(folder), now=datetime.now(UTC), command="signals") as held,
        embedded.started(held) as servers,
    ):
        assert servers.postgres is not None
        database = Database(servers.postgres.url, pool_size=4)
        database.upgrade()
        rules(database)
        with database.work() as work:
            work.run(text("INSERT INTO definition (sha256, document) VALUES ('sha', '{}')"))
            fill_points(work, minutes[-1])
        roll_up(database, lambda: True)
        made = 0
        for steps in (int(one) for one in asked.steps.split(",")):
            while made < steps // 10:
                span = {"first": made + 1, "last": min(made + 10_000, steps // 10)}
                with database.work() as work:
                    work.run(_RUNS, span | {"namespaces": NAMESPACES})
                    work.run(_STEPS, span | {"models": MODELS})
                    work.run(_ATTEMPTS, span)
                made = span["last"]
            with database.session() as session:
                session.execute(text("VACUUM ANALYZE"))
            taken = measure(database, asked.rounds)
            found["by steps"].append({"steps": steps, **taken})
            print(f"{steps:>9,} steps: " + ", ".join(f"{name} {value}" for name, value in taken.items()), flush=True)
        found["roll-ups"] = measure_roll_ups(database, minutes)
        database.close()
    for points, seconds in found["roll-ups"]:
        print(f"roll-up of {points:>9,} points: {seconds} s")
    (first, fast), (last, slow) = found["roll-ups"][0], found["roll-ups"][-1]
    if last > first and fast:
        found["exponent"] = round(math.log(slow / fast) / math.log(last / first), 2)
        print(f"exponent of time over points: {found['exponent']}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
