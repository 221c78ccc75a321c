"""
Pages of the dashboard, in a database that holds much:
`python -m benchmarks.dashboard [--runs 100000] [--items 10000] [--rounds 20] [--json FILE]`.

An embedded Postgres is filled with runs of thirty days (three steps with an attempt each, and their history), with one
run that is a map of so many items, and with a long conversation. Each page is then asked for as a
browser would, from the application itself: what is measured is the time until its HTML is complete, on one connection.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from httpx2 import Response
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from app.api.main import create_app
from app.governance.rules import service
from app.governance.signals.rollup import roll_up
from app.kernel.database import Database
from app.kernel.settings import Settings
from benchmarks import signals
from benchmarks.steps import servers

#: What a page may take on the server, milliseconds.
GOAL = 100
#: Turns of the conversation; each answer is a run.
TURNS = 200
_TRIAGE: dict[str, Any] = {
    "workflow": "triage",
    "inputs": {"text": {"type": "string", "default": "Where is my parcel?"}},
    "steps": [
        {"id": "s1", "kind": "generate", "model": "smollm2:135m", "prompt": "Which kind? {{ inputs.text }}"},
        {"id": "s2", "kind": "generate", "model": "smollm2:135m", "needs": ["s1"], "prompt": "{{ steps.s1.output }}"},
        {"id": "s3", "kind": "generate", "model": "smollm2:135m", "needs": ["s2"], "prompt": "{{ steps.s2.output }}"},
    ],
}
_DIGEST: dict[str, Any] = {
    "workflow": "digest",
    "inputs": {"texts": {"type": "array", "default": ["Good tent."]}},
    "steps": [
        {
            "id": "read",
            "kind": "map",
            "over": "inputs.texts",
            "step": {"kind": "generate", "model": "smollm2:135m", "prompt": "Sentiment of: {{ item }}"},
        }
    ],
}

#: Ids as the application makes them: they sort by age.
_ID = """
    (lpad(to_hex(CAST(extract(epoch FROM at) * 1000 AS bigint)), 12, '0') || '7' || substr(md5('run' || n), 1, 3)
     || '8' || substr(md5('run' || n), 4, 15))::uuid
"""
#: The oldest three are of a workflow, a namespace and a label that no other run has; of the newest, thirty run.
_RUNS = text(f"""
    INSERT INTO run (id, namespace, workflow, version, sha256, state, paused, workflow_paused, priority, rank, labels,
                     inputs, inputs_bytes, output, output_bytes, error, depth, retention_s, created_at, started_at,
                     finished_at)
    SELECT {_ID}, CASE WHEN n <= 3 THEN 'small' WHEN n % 5 = 0 THEN 'shop' ELSE 'default' END,
           CASE WHEN n <= 3 THEN 'rare' WHEN n % 10 = 0 THEN 'other' ELSE 'triage' END, 1, :sha256, state,
           false, false, 'standard', 1,
           jsonb_build_object('customer', 'c' || n % 1000)
               || CASE WHEN n <= 3 THEN '{{"audit": "yes"}}'::jsonb ELSE '{{}}' END,
           json_build_object('text', 'Message ' || n), 30,
           CASE WHEN state = 'succeeded' THEN to_json('Answer'::text) END,
           CASE WHEN state = 'succeeded' THEN 8 END,
           CASE WHEN state = 'failed' THEN json_build_object('message', 'the step s2 failed') END, 0, 2592000, at, at,
           CASE WHEN state <> 'running' THEN at + interval '3 s' END
    FROM (
        SELECT n, now() - interval '30 days' * ((:runs - n)::float / :runs) - interval '1 minute' AS at,
               CASE WHEN n > :runs - 30 THEN 'running' WHEN n % 50 = 0 THEN 'failed' WHEN n % 97 = 0 THEN 'cancelled'
                    ELSE 'succeeded' END AS state
        FROM generate_series(1, CAST(:runs AS integer)) AS n
    ) AS made
""")
_STEP = """
    id, run_id, parent_id, item, key, position, kind, model, model_index, queue, priority, rank, state, delegated,
    attempt, failures, losses, input, input_bytes, output, output_bytes, error, tokens_in, tokens_out, ready_at,
    started_at, finished_at
"""
_STEPS = text(f"""
    INSERT INTO step ({_STEP})
    SELECT md5(run.id::text || n)::uuid, run.id, NULL, NULL, 's' || n, n - 1, 'generate', 'smollm2:135m', 0,
           'model.smollm2-135m', 'standard', 1,
           CASE WHEN run.state = 'succeeded' OR n = 1 THEN 'succeeded' WHEN run.state = 'running' THEN 'pending'
                WHEN run.state = 'failed' AND n = 2 THEN 'failed' ELSE 'skipped' END,
           false, 1, 0, 0, NULL, NULL, to_json(repeat('word ', 40)), 202,
           CASE WHEN run.state = 'failed' AND n = 2 THEN json_build_object('message', 'the model gave no JSON') END,
           60, 40, created_at, created_at + n * interval '1 s', created_at + (n + 1) * interval '1 s'
    FROM run, generate_series(1, 3) AS n WHERE run.id <> :map
""")
_ATTEMPTS = text("""
    INSERT INTO attempt (step_id, attempt, owner, model, started_at, finished_at, outcome, tokens_in, tokens_out,
                         first_token_ms)
    SELECT id, 1, 'pool@h/1/p', model, started_at, finished_at, 'succeeded', tokens_in, tokens_out, 80
    FROM step WHERE kind = 'generate' AND state = 'succeeded'
""")
_HISTORY = text("""
    INSERT INTO history (run_id, at, step, attempt, event)
    SELECT run_id, started_at + n * interval '10 ms', key, 1, (ARRAY['ready', 'running', 'succeeded'])[n]
    FROM step, generate_series(1, 3) AS n ORDER BY step.started_at
""")
_MAP = text(f"""
    WITH map AS (
        INSERT INTO step ({_STEP})
        SELECT md5('map')::uuid, :run, NULL, NULL, 'read', 0, 'map', NULL, 0, 'io', 'standard', 1, 'awaiting', true, 1,
               0, 0, NULL, NULL, NULL, NULL, NULL, 0, 0, now(), now(), NULL
        RETURNING id
    )
    INSERT INTO fan_out (step_id, total, waiting, in_flight, failed, stopping)
    SELECT id, CAST(:items AS integer), 0, 0, 0, false FROM map
""")
_ITEMS = text(f"""
    INSERT INTO step ({_STEP})
    SELECT md5('item' || n)::uuid, :run, md5('map')::uuid, n, 'read[' || n || ']', 0, 'generate', 'smollm2:135m', 0,
           'model.smollm2-135m', 'standard', 1, 'succeeded', false, 1, 0, 0, to_json('Review ' || n), 12,
           to_json(repeat('word ', 40)), 202, NULL, 60, 40, now(), now(), now()
    FROM generate_series(0, CAST(:items AS integer) - 1) AS n
""")
_FOUND = text("""
    (SELECT state, id FROM run WHERE state = 'succeeded' ORDER BY id DESC LIMIT 1)
    UNION (SELECT state, id FROM run WHERE state = 'failed' ORDER BY id DESC LIMIT 1)
    UNION (SELECT state, id FROM run WHERE state = 'running' ORDER BY id LIMIT 1)
    UNION (SELECT 'map', id FROM run WHERE state = 'running' AND workflow = 'digest')
    UNION (SELECT 'middle', id FROM (SELECT id FROM run ORDER BY id OFFSET :middle LIMIT 1) AS chosen)
""")
#: The newest run becomes the one that has the map.
_OF_MAP = text("""
    UPDATE run SET workflow = 'digest', sha256 = :sha256 WHERE id = (SELECT max(id::text)::uuid FROM run) RETURNING id
""")


@dataclass(frozen=True, slots=True)
class PageTime:
    """One page."""

    name: str
    path: str
    #: Milliseconds on the server.
    p50: float
    p95: float
    #: Of the HTML.
    kib: float


def fill(database: Database, browser: TestClient, runs: int, items: int) -> dict[str, str]:
    """Put so many runs, a map of so many items, signals and a conversation into an empty database. Returns ids."""
    for version in range(20):
        document = {**_TRIAGE, "description": f"Edited {version} times."}
        _sent(browser.put("/v1/workflows/triage", json=document))
    _sent(browser.put("/v1/workflows/digest", json=_DIGEST))
    with database.work() as work:
        hashes = {
            row.name: row.sha256
            for row in work.rows(text("SELECT DISTINCT ON (name) name, sha256 FROM workflow ORDER BY name, version"))
        }
        work.run(_RUNS, {"runs": runs, "sha256": hashes["triage"]})
        chosen = work.row(_OF_MAP, {"sha256": hashes["digest"]})
        assert chosen is not None
        work.run(_STEPS, {"map": chosen.id})
        work.run(_ATTEMPTS)
        work.run(_HISTORY)
        work.run(_MAP, {"run": chosen.id, "items": items})
        work.run(_ITEMS, {"run": chosen.id, "items": items})
        signals.fill_points(work, 24 * 60)
        found = {row.state: str(row.id) for row in work.rows(_FOUND, {"middle": runs // 2})}
    roll_up(database, lambda: True)
    with database.session() as session:
        session.execute(text("VACUUM ANALYZE"))
    service.ensure_builtin(database)
    made = _sent(browser.post("/v1/conversations", json={"title": "A long one"}))
    for turn in range(TURNS):
        turns = [
            {"type": "message", "role": "user", "content": f"Question {turn}: where is parcel {turn * 37}?"},
            {"type": "message", "role": "assistant", "content": f"Parcel {turn * 37} is on its way. " * 10},
        ]
        _sent(browser.post(f"/v1/conversations/{made['id']}/items", json={"items": turns}))
    return {**found, "conversation": made["id"]}


def pages(ids: Mapping[str, str]) -> Mapping[str, str]:
    """By name, the paths."""
    return {
        "overview": "/ui/overview",
        "runs": "/ui/runs",
        "runs, from the middle": f"/ui/runs?cursor={ids['middle']}",
        "runs, failed": "/ui/runs?state=failed",
        "runs of a rare workflow": "/ui/runs?workflow=rare",
        "runs of a rare label": "/ui/runs?label=audit%3Dyes",
        "run": f"/ui/runs/{ids['succeeded']}?step=s2",
        "run, failed": f"/ui/runs/{ids['failed']}",
        "run, running": f"/ui/runs/{ids['running']}",
        "run with a map": f"/ui/runs/{ids['map']}?step=read",
        "queues": "/ui/queues",
        "fleet": "/ui/fleet",
        "workflows": "/ui/workflows",
        "workflow": "/ui/workflows/triage",
        "difference of versions": "/ui/workflows/triage/diff?old=1&new=20",
        "editor": "/ui/workflows/triage/edit",
        "schedules": "/ui/schedules",
        "playground": "/ui/playground",
        "alerts": "/ui/alerts",
        "rule": "/ui/rules/responses-slow",
        "conversations": "/ui/conversations",
        "conversation": f"/ui/conversations/{ids['conversation']}",
        "memories": "/ui/memories",
        "blocks": "/ui/blocks",
        "trends": "/ui/trends",
        "trends, six hours": "/ui/trends?window=6h",
        "trends, a day": "/ui/trends?window=24h",
        "trends, a week": "/ui/trends?window=7d",
        "batches": "/ui/batches",
        "settings": "/ui/settings",
        "keys": "/ui/keys",
        "audit": "/ui/audit",
    }


def measure(browser: TestClient, name: str, path: str, rounds: int) -> PageTime:
    """Ask for a page so many times; the first answer is thrown away."""
    taken, size = [], 0
    for _ in range(rounds + 1):
        began = time.perf_counter()
        answer = browser.get(path)
        taken.append((time.perf_counter() - began) * 1000)
        if answer.status_code != HTTPStatus.OK:
            raise SystemExit(f"{path}: {answer.status_code} {answer.text[:300]}")
        size = len(answer.content)
    p95 = statistics.quantiles(taken[1:], n=20)[-1]
    return PageTime(name, path, round(statistics.median(taken[1:]), 1), round(p95, 1), round(size / 1024, 1))


def _sent(answer: Response) -> Any:
    if not answer.is_success:
        raise SystemExit(f"{answer.request.url}: {answer.status_code} {answer.text[:300]}")
    return answer.json()


def main() -> None:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with servers() as (made, folder):
        assert made.postgres is not None
        assert made.valkey is not None
        settings = Settings(data_dir=folder / "data", database_url=made.postgres.url, redis_url=made.valkey.url)
        database = Database(made.postgres.url, pool_size=2)
        accept = {"Accept": "text/html,*/*;q=0.8"}
        local = {"base_url": "http://localhost", "client": ("127.0.0.1", 1)}
        with TestClient(create_app(settings), headers=accept, **local) as browser:
            ids = fill(database, browser, asked.runs, asked.items)
            # As `arriero up` does before it forks: what was imported is not gone through again and again.
            gc.collect()
            gc.freeze()
            found = [measure(browser, name, path, asked.rounds) for name, path in pages(ids).items()]
        database.close()
    table = Table("page", "p50, ms", "p95, ms", "KiB", title=f"{asked.runs:,} runs, a map of {asked.items:,} items")
    for one in found:
        table.add_row(one.name, str(one.p50), str(one.p95), str(one.kib))
    console = Console()
    console.print(table)
    console.print(f"slowest: {max(one.p50 for one in found)} ms; the goal is {GOAL}")
    if asked.json:
        asked.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
