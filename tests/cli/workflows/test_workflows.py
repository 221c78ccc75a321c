"""`arriero workflows` with a running API, invoked as by the root command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from app.api.services import Services
from app.catalog import files
from app.cli.workflows.workflows import app
from app.devices.inventory import Devices
from app.kernel import settings
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, InvalidInput, NotFound
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.workflows import registry
from app.workflows.language import check, schema
from app.workflows.runs.service import Runs
from tests.cli.conftest import serving

ONE = """
workflow: greet
steps:
  - {id: hello, kind: generate, model: 'smollm2:135m', prompt: "Greet them.\\nBe brief.\\n"}
  - {id: rest, kind: noop, needs: [hello]}
"""
TWO = """
workflow: greet
steps:
  - {id: wait, kind: noop, needs: [hello]}
  - {id: hello, kind: generate, model: 'smollm2:135m', prompt: "Greet them.\\nBe kind.\\n", max_tokens: 9}
"""

Run = Callable[..., Result]


@pytest.fixture
def address(database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path) -> Iterator[str]:
    """The URL of an API with two versions of a workflow."""
    for text in (ONE, TWO):
        registry.put(database, "greet", check.parse(text))
    settings = Settings(data_dir=tmp_path)
    devices, commands = Devices(settings.fleet), OperatorCommands(database, lambda: None)
    with serving(Services(settings, database, publisher, runs, files.read_catalog(), devices, commands)) as url:
        yield url


@pytest.fixture
def run(address: str) -> Run:
    """Runs a command against that API and raises its errors, as the root command expects."""

    def run(*arguments: str | Path) -> Result:
        loaded = settings.load(environment={"ARRIERO_API__URL": address})
        result = CliRunner().invoke(app, [str(a) for a in arguments], obj=loaded)
        if isinstance(result.exception, ArrieroError):
            raise result.exception
        return result

    return run


def test_differences_are_printed_like_a_patch(run: Run) -> None:
    lines = run("diff", "greet").stdout.splitlines()

    assert lines == [
        "greet: version 1 → version 2",
        "+ steps.wait",
        "    + kind: noop",
        "    + needs:",
        "    + - hello",
        "~ steps.hello.prompt",
        "    @@ -1,2 +1,2 @@",
        "      Greet them.",
        "    - Be brief.",
        "    + Be kind.",
        "+ steps.hello.max_tokens",
        "    + 9",
        "- steps.rest",
        "    - kind: noop",
        "    - needs:",
        "    - - hello",
    ]
    assert run("diff", "greet", "2", "2").stdout.splitlines()[1:] == ["no differences"]


def test_programs_get_json(run: Run) -> None:
    found = json.loads(run("diff", "greet", "1", "--json").stdout)

    assert (found["old"], found["new"]) == (1, 2)
    assert {"kind": "added", "path": "steps.hello.max_tokens", "old": None, "new": 9} in found["changes"]


def test_a_file_is_compared_with_the_newest_version(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(TWO), "description": "mine"}, sort_keys=False))

    shown = run("diff", file).stdout.splitlines()
    assert shown[0].startswith("greet: version 2 → ")
    assert shown[1:] == ["+ description", "    + mine"]
    found = json.loads(run("diff", file, "support-triage", "--json").stdout)
    assert (found["name"], found["old"]) == ("support-triage", 0)
    assert found["changes"][0] == {"kind": "changed", "path": "workflow", "old": "support-triage", "new": "greet"}


def test_unknown_names_and_versions_are_reported(run: Run) -> None:
    with pytest.raises(NotFound, match="there are: 2, 1"):
        run("diff", "greet", "9")
    with pytest.raises(NotFound, match="greet"):
        run("diff", "greeet")
    with pytest.raises(NotFound, match="no file"):
        run("diff", "greet.yaml")
    with pytest.raises(InvalidInput, match="'one' is not a version"):
        run("diff", "greet", "one")


def test_the_schema_is_printed(run: Run) -> None:
    assert json.loads(run("schema").stdout) == schema.workflow()


def test_files_and_folders_are_checked_and_every_problem_names_its_file(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "flows"
    (folder / "more").mkdir(parents=True)
    (folder / "greet.yaml").write_text(ONE)
    (folder / "more" / "wrong.yml").write_text("workflow: w\nsteps:\n  - {id: a, kind: noop, needs: [b, c]}\n")
    (folder / "more" / "inputs.json").write_text('{"text": "x"}')
    (folder / "more" / "nightly.yaml").write_text("schedule: nightly\nworkflow: greet\nevery: 1h\n")
    found = run("check", folder)

    assert found.exit_code == 2
    assert found.stdout == f"{folder}/greet.yaml: greet can run: 2 steps, models smollm2:135m\n"
    errors = found.stderr.replace("\n", " ")
    for inner, message in (
        ("inputs.json", "not a workflow, skipped"),
        ("nightly.yaml", "not a workflow, skipped"),
        ("wrong.yml", "steps[0].needs[0] (line 3): there is no step 'b'"),
        ("wrong.yml", "steps[0].needs[1] (line 3): there is no step 'c'"),
    ):
        assert f"{folder}/more/{inner}: {message}" in errors
    assert run("check", folder / "greet.yaml").stdout == "greet can run: 2 steps, models smollm2:135m\n"
    assert run("check", folder / "greet.yaml", folder / "greet.yaml").exit_code == 0
    with pytest.raises(InvalidInput, match=r"line 3"):
        run("check", folder / "more" / "wrong.yml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="no YAML or JSON file in"):
        run("check", tmp_path / "empty")
