"""`arriero status`, and who answers at the address of the API."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.api.services import Services
from app.catalog import files
from app.cli import app
from app.cli.processes.records import TreeRecord, TreeState
from app.devices.inventory import Devices
from app.kernel import clock
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.processes.data_directory import DataDirectory
from app.kernel.sections.work import PoolSettings
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.cli.conftest import serving


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """The URL of a server with one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def status(directory: Path, url: str, *, exits: int, state: TreeState = TreeState.READY) -> dict[str, Any]:
    """What the command says of a directory that this process holds, with its API at the URL."""
    with DataDirectory(directory, now=clock.now(), command="arriero up"):
        TreeRecord(os.getpid(), "this one", "1", state=state, api=url).save(directory)
        options = ["--data-dir", str(directory), "--set", "pools.models="]
        for form in ([], ["--json"]):
            result = CliRunner().invoke(app, [*options, "status", *form], catch_exceptions=False)
            assert result.exit_code == exits, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    ("code", "body", "problem"),
    [
        (200, b'{"ready": true, "instance": "another one"}', "another API answers at"),
        (200, b"<html>", "another API answers at"),
        (404, b"[]", "another API answers at"),
        (
            503,
            b'{"ready": false, "instance": "this one", "database": "gone", "broker": "ok"}',
            "API: database: gone; broker: ok",
        ),
    ],
)
def test_only_the_own_api_counts(tmp_path: Path, code: int, body: bytes, problem: str) -> None:
    with answering(code, body) as url:
        found = status(tmp_path, url, exits=1)

    assert found["state"] == "degraded"
    assert [text for text in found["problems"] if text.startswith(problem)]
    assert [process["name"] for process in found["processes"]] == ["up"], "known without the API"


def test_an_api_that_is_down_is_a_problem(tmp_path: Path) -> None:
    found = status(tmp_path, "http://127.0.0.1:9", exits=1)

    assert found["problems"][0].startswith("API: no answer at http://127.0.0.1:9 (")
    assert found["api"] == {"url": "http://127.0.0.1:9", "ready": False}


def test_a_start_is_not_asked(tmp_path: Path) -> None:
    assert status(tmp_path, "http://127.0.0.1:9", exits=1, state=TreeState.STARTING)["problems"] == [
        "arriero up is starting"
    ]


def test_runs_in_progress_are_counted(
    tmp_path: Path, database: Database, publisher: CeleryPublisher, runs: Runs
) -> None:
    waiting = {"workflow": "w", "steps": [{"id": "a", "kind": "wait", "event": "e"}]}
    for _ in range(2):
        runs.submit(Submission(check.parse(json.dumps(waiting)), {}))
    settings = Settings(data_dir=tmp_path, pools=PoolSettings(models=()))
    catalog, commands = files.read_catalog(()), OperatorCommands(database, lambda: None)
    devices = Devices(settings.fleet)
    with serving(Services(settings, database, publisher, runs, catalog, devices, commands, "this one")) as url:
        found = status(tmp_path, url, exits=0)

    assert found["state"] == "running"
    assert sum(found["runs"].values()) == 2
