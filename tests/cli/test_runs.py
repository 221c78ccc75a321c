"""`arriero runs`, against an API that serves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from click.testing import Result
from typer.testing import CliRunner

from app.api.main import serve
from app.api.services import Services
from app.cli import app
from app.fleet import files
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.settings import ApiSettings, Settings
from app.workflows import check
from app.workflows.service import Runs
from app.workflows.submission import Submission
from tests.workflows.conftest import Hands

FLOW = "workflow: flow\ndefaults: {model: 'm:1'}\nsteps: [{id: a, kind: generate, prompt: hi}]\n"

Arriero = Callable[..., Result]


@pytest.fixture
def arriero(database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path) -> Iterator[Arriero]:
    """The command, with the address of an API that shows little."""
    settings = Settings(data_dir=tmp_path, api=ApiSettings(max_inline_bytes=10))
    services = Services(settings, database, publisher, runs, files.read_catalog())
    server = uvicorn.Server(uvicorn.Config(serve(services), port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(app, ["--set", f"api.url={url}", "runs", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result

    yield run
    server.should_exit = True
    thread.join()


def test_a_long_output_is_printed_whole(arriero: Arriero, runs: Runs) -> None:
    hands = Hands(runs)
    run_id = str(runs.submit(Submission(check.parse(FLOW), {})).id)
    hands.work(a="a long text")

    assert json.loads(arriero("output", run_id).stdout) == {"a": "a long text"}
    assert json.loads(arriero("output", run_id, "--step", "a").stdout) == "a long text"
    assert json.loads(arriero("watch", run_id, "--json").stdout)["output"] == {"a": "a long text"}
    shown = json.loads(arriero("show", run_id, "--json").stdout)
    assert (shown["output"], shown["steps"][0]["output"]["$payload"]["bytes"]) == ({"a": "a long text"}, 13)
    assert "a long text" in arriero("show", run_id).stdout
