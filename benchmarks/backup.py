"""
What a backup and a restore take: `python -m benchmarks.backup [--runs 100000] [--vectors 20000] [--json FILE]`.

An embedded Postgres is filled with ended runs of three steps with texts, and with passages of text with vectors. It is
saved to a tar file, verified, and restored into a second database of the same server, with simple updates every 5 ms
beside the backup, whose latency is compared with that before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import psycopg
from sqlalchemy import text
from sqlalchemy.engine import make_url

from app.backup import archive, restoring, saving, verification
from app.kernel import embedded
from app.kernel.database import Database

T = TypeVar("T")

_RUNS = text("""
    INSERT INTO run (id, workflow, sha256, state, paused, workflow_paused, priority, rank, inputs, output, depth,
                     retention_s, created_at, started_at, finished_at, expires_at)
    SELECT gen_random_uuid(), 'kept', 'kept', 'succeeded', false, false, 'standard', 1,
           jsonb_build_object('question', md5(n::text) || md5((n + 1)::text)),
           jsonb_build_object('answer', repeat(md5(n::text) || ' ', 12)), 0, 2592000, now(), now(), now(),
           now() + interval '29 days'
    FROM generate_series(1, :runs) AS n
""")
_STEPS = text("""
    INSERT INTO step (id, run_id, key, position, kind, model, model_index, queue, priority, rank, state, delegated,
                      attempt, failures, losses, tokens_in, tokens_out, output, created_at, ready_at, started_at,
                      finished_at)
    SELECT gen_random_uuid(), run.id, 's' || n, n, 'generate', 'm:1', 0, 'model.m-1', 'standard', 1, 'succeeded', false,
           1, 0, 0, 100, 100, to_jsonb(repeat(md5(run.id::text || n) || ' ', 6)), now(), now(), now(), now()
    FROM run, generate_series(1, 3) AS n
""")
_ATTEMPTS = text("""
    INSERT INTO attempt (step_id, attempt, owner, model, started_at, finished_at, outcome)
    SELECT id, 1, 'w@h/1/a', model, started_at, finished_at, 'succeeded' FROM step
""")
_PASSAGES = text("""
    INSERT INTO passage (namespace, owner, source, source_id, part, thread, place, text, length, lexemes)
    SELECT 'default', 'u', 'message', n, 0, 't', n, body, 12, to_tsvector('simple', body)
    FROM (SELECT n, md5(n::text) || ' some words of a passage ' || md5((n + 1)::text) AS body
          FROM generate_series(1, :vectors) AS n) AS made
""")
_VECTORS = text("""
    INSERT INTO passage_vector (passage_id, model_id, vector)
    SELECT passage.id, recall_model.id, made.vector
    FROM passage, recall_model, LATERAL (
        SELECT array_agg(sin(passage.id * n))::real[]::vector(384)::halfvec AS vector FROM generate_series(1, 384) AS n
    ) AS made
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--vectors", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with (
            embedded.DataDirectory(place, now=datetime.now(UTC), command="benchmark") as held,
            embedded.started(held, valkey=False) as servers,
        ):
            assert servers.postgres is not None
            found = measured(servers.postgres.url, place, options.runs, options.vectors)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def measured(url: str, place: Path, runs: int, vectors: int) -> dict[str, float]:
    """Fill, save, verify and restore."""
    database = Database(url)
    database.upgrade()
    with database.work() as work:
        work.run(text("INSERT INTO definition (sha256, document) VALUES ('kept', '{}')"))
        work.run(_RUNS, {"runs": runs})
        work.run(_STEPS)
        work.run(_ATTEMPTS)
        work.run(text("INSERT INTO recall_model (name, state, dimensions) VALUES ('m', 'ready', 384)"))
        work.run(_PASSAGES, {"vectors": vectors})
        work.run(_VECTORS)
        work.run(text("CREATE TABLE probe_of_benchmark (n int)"))
        work.run(text("INSERT INTO probe_of_benchmark VALUES (0)"))
    with database.session() as connection:
        connection.execute(text("VACUUM ANALYZE"))
    with updates(database) as latencies:
        time.sleep(5)
    before = list(latencies)
    target = place / "backup.tar"
    with updates(database) as latencies:
        saved, save_s = timed(lambda: saving.save(database, target, place, {}))
    with archive.opened(target) as opened:
        of = verification.read_manifest(opened)
        _, verify_s = timed(lambda: verification.verify(opened, of))
    with database.session() as connection:
        size = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
        connection.execute(text("DROP TABLE probe_of_benchmark"))
    clean = place / "clean.tar"
    saving.save(database, clean, place, {})
    with psycopg.connect(database.conninfo(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE restored")
    other = Database(make_url(url).set(database="restored").render_as_string(hide_password=False))
    with archive.opened(clean) as opened:
        of = verification.read_manifest(opened)
        _, restore_s = timed(lambda: restoring.restore(other, opened, of, place / "there"))
    other.close()
    database.close()
    return {
        "rows": saved.manifest.rows,
        "database_mb": round(size / 1e6, 1),
        "archive_mb": round(target.stat().st_size / 1e6, 1),
        "save_s": round(save_s, 1),
        "verify_s": round(verify_s, 1),
        "restore_s": round(restore_s, 1),
        "update_p50_ms_before": round(statistics.median(before) * 1000, 2),
        "update_p50_ms_during": round(statistics.median(latencies) * 1000, 2),
        "update_p99_ms_before": round(statistics.quantiles(before, n=100)[98] * 1000, 2),
        "update_p99_ms_during": round(statistics.quantiles(latencies, n=100)[98] * 1000, 2),
    }


@contextmanager
def updates(database: Database) -> Iterator[list[float]]:
    """Update a row all the time, and yield the seconds that each took."""
    seconds: list[float] = []
    done = threading.Event()

    def update() -> None:
        with psycopg.connect(database.conninfo(), autocommit=True) as connection:
            while not done.wait(0.005):
                begun = time.perf_counter()
                connection.execute("UPDATE probe_of_benchmark SET n = n + 1")
                seconds.append(time.perf_counter() - begun)

    thread = threading.Thread(target=update)
    thread.start()
    try:
        yield seconds
    finally:
        done.set()
        thread.join()


def timed(act: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    result = act()
    return result, time.perf_counter() - begun


if __name__ == "__main__":
    main()
