"""Flower as a program: this machine's user can reach its pages and its API, pages of other sites cannot."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from app.kernel import ids
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.servers import FlowerSettings
from app.kernel.settings import Settings, environment_of
from app.workflows.runs.messages import RUN_STEP
from tests.live.conftest import until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flower(database_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running Flower."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("flower"),
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        flower=FlowerSettings(port=0),
        trusted_hosts=("flower.example.com",),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.programs", "flower"],
        cwd=ROOT,
        env=environment_of(settings) | {"PYTHONPATH": str(ROOT), "HOME": os.sep},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    output = ""
    for line in process.stderr:
        output += line
        if (found := re.search(r'"port": (\d+)', line)) and "flower_listening" in line:
            break
    else:
        pytest.fail(output)
    rest = threading.Thread(target=process.stderr.read)
    rest.start()
    yield f"http://127.0.0.1:{found[1]}"
    process.terminate()
    assert process.wait(30) == 0
    rest.join()
    process.stderr.close()


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"Host": "evil.example"}, "Host"),
        ({"Origin": "http://evil.example"}, "Origin"),
        ({"Sec-Fetch-Site": "cross-site"}, "Sec-Fetch-Site"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/api/workers"),
        ("GET", "/static/js/flower.js"),
        ("GET", "/metrics"),
        ("POST", "/api/worker/shutdown/control@here"),
        ("POST", "/api/task/send-task/workers.jobs.run_sweep"),
        ("OPTIONS", "/api/workers"),
    ],
)
def test_pages_of_other_sites_cannot_read_or_control_workers(
    flower: str, headers: dict[str, str], named: str, method: str, path: str
) -> None:
    answer = httpx2.request(method, f"{flower}{path}", headers=headers, trust_env=False, timeout=30)

    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["errors"][0]["where"] == named
    assert repr(headers[named]) in answer.json()["detail"]


def test_its_own_pages_and_other_programs_are_answered(flower: str) -> None:
    with httpx2.Client(trust_env=False, timeout=30) as client:
        assert client.get(f"{flower}/").status_code == 200
        assert client.get(f"{flower}/healthcheck").status_code == 200
        # A trusted name passes the guard; who uses it may come from elsewhere, and needs a key.
        assert client.get(f"{flower}/", headers={"Host": "flower.example.com"}).status_code == 401
        own = {"Origin": flower, "Sec-Fetch-Site": "same-origin"}
        answer = client.get(f"{flower}/api/workers", headers=own)
        assert answer.status_code == 200
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_who_comes_from_elsewhere_needs_a_key(flower: str) -> None:
    with httpx2.Client(trust_env=False, timeout=30, headers={"X-Forwarded-For": "10.0.0.7"}) as client:
        for path in ("/", "/tasks", "/broker", "/api/workers", "/metrics", "/nowhere"):
            answer = client.get(f"{flower}{path}")
            assert (path, answer.status_code) == (path, 401)
            assert answer.headers.get_list("WWW-Authenticate")[0].startswith("Basic realm=")
            assert "an API key is needed" in answer.json()["detail"]
        assert client.post(f"{flower}/api/worker/shutdown/control@here").status_code == 401
        assert client.get(f"{flower}/healthcheck").status_code == 200


def test_queues_without_a_worker_are_shown(flower: str, publisher: CeleryPublisher) -> None:
    """There, work waits that nobody does."""
    for priority in (0, 3):
        assert publisher.publish(RUN_STEP, [str(ids.new_id()), 1], queue="model.smollm2-135m", priority=priority)
    with httpx2.Client(trust_env=False, timeout=30) as client:
        found = {one["name"]: one for one in client.get(f"{flower}/api/queues/length").json()["active_queues"]}
        page = client.get(f"{flower}/broker").text

    assert (found["model.smollm2-135m"]["messages"], found["model.smollm2-135m"]["consumers"]) == (2, 0)
    assert {"control", "io"} <= set(found)
    assert "model.smollm2-135m" in page
    assert "model.gemma3-270m" not in page, "it has no messages and no worker"


def test_changes_are_in_the_audit_log(flower: str, database: Database) -> None:
    """A request that fails is there too. It is written after the answer."""
    answer = httpx2.post(f"{flower}/api/task/revoke/unknown", trust_env=False, timeout=30)
    assert answer.status_code == 404

    def written() -> bool:
        with database.work() as work:
            rows = work.rows(text("SELECT actor, action, status FROM audit_entry"))
        return [(row.actor, row.action, row.status) for row in rows] == [
            ("local", "Flower POST /api/task/revoke/unknown", 404)
        ]

    assert until(written)


def test_a_flower_that_is_started_on_demand_ends_when_nobody_uses_it(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    """It uses the socket of its parent, which starts it again for the next client; its end is a success."""
    settings = Settings(data_dir=tmp_path, database_url=SecretStr(database_url), redis_url=SecretStr(redis_url))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        script = (
            "import sys, workers.flower, workers.programs; workers.flower._UNUSED_SECONDS = 3.0; "
            f"sys.exit(workers.programs.main(['flower', '{listener.fileno()}']))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment_of(settings) | {"FLOWER_UNAUTHENTICATED_API": "true"},
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            answer = httpx2.get(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=60, trust_env=False)
            assert answer.is_success, "the client waits while it starts"
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
