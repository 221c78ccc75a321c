"""A batch of 5,000 requests on `arriero up`: its control worker and its pool are killed, and nothing is done twice."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from sqlalchemy import text

from tests.faults import installation
from tests.faults.conftest import PATIENCE, assert_nothing_left, is_pool, processes_of, until
from tests.faults.installation import api_url, database_of, is_up, members

LINES = 5_000
CATALOG = """
[[models]]
name = "alpha:1"
use_cases = ["chat"]
slots = 16
source = { path = "/nowhere/alpha.gguf" }
simulated = { bytes = "600MiB", load = "100ms", tokens_per_second = 1000 }
"""
ATTEMPTS = text("""
    SELECT count(*) FILTER (WHERE outcome = 'succeeded') AS done, count(DISTINCT step_id) AS steps,
           count(*) FILTER (WHERE outcome = 'worker_lost') AS lost, count(*) AS attempts
    FROM attempt JOIN step ON step.id = step_id WHERE parent_id IS NOT NULL
""")


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    assert_nothing_left(tmp_path / "data")


def line(number: int) -> str:
    messages = [{"role": "user", "content": f"Say {number}"}]
    body = {"model": "alpha:1", "messages": messages, "max_tokens": 4}
    return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body})


@pytest.mark.storm
def test_each_request_is_done_once_though_workers_are_killed(data_dir: Path, tmp_path: Path) -> None:
    settings = {"pools.models": "alpha:1", "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}]'}
    output = tmp_path / "output.txt"
    with installation.up(data_dir, output, settings, CATALOG) as process:
        until(lambda: is_up(process, output))
        with httpx2.Client(base_url=api_url(data_dir), trust_env=False, timeout=PATIENCE) as client:
            began = time.monotonic()
            batch = create(client)

            until(lambda: completed(client, batch) >= 1000)
            (pool,) = [one for one in processes_of(data_dir) if is_pool(one)]
            pool.kill()
            until(lambda: completed(client, batch) >= 2500)
            psutil.Process(members(data_dir)["control"]).kill()

            ended = until(lambda: found if (found := get(client, batch))["status"] == "completed" else None)
            print(f"{LINES} requests in {time.monotonic() - began:.1f} s")  # noqa: T201 a figure beside a failure
            counts = {"total": LINES, "completed": LINES, "failed": 0}
            assert (ended["request_counts"], ended["error_file_id"]) == (counts, None)
            results = client.get(f"/v1/files/{ended['output_file_id']}/content").text.splitlines()
            assert sorted(int(json.loads(one)["custom_id"]) for one in results) == list(range(LINES))

        with database_of(data_dir).work() as work:
            (found,) = work.rows(ATTEMPTS)
        assert (found.done, found.steps) == (LINES, LINES), "each has exactly one answer"
        assert 1 <= found.lost <= 16, "the killed pool held some"
        assert found.attempts == LINES + found.lost, "no other was begun twice"
        process.send_signal(signal.SIGINT)
        until(lambda: process.poll() is not None)


def create(client: httpx2.Client) -> str:
    content = "\n".join(map(line, range(LINES))).encode()
    file = client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})
    body = {"input_file_id": file.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return str(client.post("/v1/batches", json=body).json()["id"])


def get(client: httpx2.Client, batch: str) -> Any:
    return client.get(f"/v1/batches/{batch}").json()


def completed(client: httpx2.Client, batch: str) -> int:
    return int(get(client, batch)["request_counts"]["completed"])
