"""`arriero runs`, against an API that serves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.cli import app
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.settings import ApiSettings, Settings
from app.workflows import check
from app.workflows.service import Runs
from app.workflows.submission import Submission
from tests.serving import served, services_of
from tests.workflows.conftest import Hands

FLOW = "workflow: flow\ndefaults: {model: 'm:1'}\nsteps: [{id: a, kind: generate, prompt: hi}]\n"

Arriero = Callable[..., Result]


@pytest.fixture
def arriero(database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path) -> Iterator[Arriero]:
    """The command, with the address of an API that shows little."""
    settings = Settings(data_dir=tmp_path, api=ApiSettings(max_inline_bytes=10))
    with served(services_of(settings, database, publisher, runs)) as url:

        def run(*arguments: str) -> Result:
            result = CliRunner().invoke(app, ["--set", f"api.url={url}", "runs", *arguments], env={"COLUMNS": "200"})
            assert result.exit_code == 0, result.output
            return result

        yield run


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
