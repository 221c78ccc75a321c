"""Output into pipes: no line is wrapped, coloured or cut, whatever the environment says of the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from app.kernel.database import Database
from app.workflows import registry
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.cli.conftest import Arriero
from tests.workflows.conftest import StepWorker

LONG = "a long text that no pipe may break " * 12
FLOW = f"""
workflow: flow
steps:
  - {{id: a, kind: transform, cel: '{{"text": inputs.text, "list": [inputs.text]}}'}}
  - {{id: ok, kind: wait, needs: [a], approval: {{message: {json.dumps(LONG)}}}}}
inputs: {{text: {{type: string}}}}
outputs: {{text: steps.a.output.text}}
"""
SCHEDULE = "schedule: nightly\nworkflow: flow\ncron: 30 2 * * *\ninputs: {text: " + LONG + "}\n"
#: Environments of a terminal that have nothing to say about a pipe.
ENVIRONMENTS: list[dict[str, str]] = [
    {"COLUMNS": "40", "NO_COLOR": "1"},
    {"COLUMNS": "40", "TERM": "dumb"},
    {"COLUMNS": "200", "TERM": "xterm-256color"},
]
COMMANDS: list[tuple[str, ...]] = [
    ("runs", "list"),
    ("runs", "show", "RUN"),
    ("runs", "history", "RUN"),
    ("runs", "output", "RUN"),
    ("runs", "watch", "RUN"),
    ("workflows", "list"),
    ("workflows", "show", "flow"),
    ("workflows", "diff", "flow", "1", "2"),
    ("schedules", "list"),
    ("schedules", "show", "nightly"),
    ("schedules", "preview", "nightly"),
    ("models", "list"),
    ("models", "show", "smollm2:135m"),
    ("fleet",),
    ("fleet", "why", "smollm2:135m"),
    ("pools", "list"),
    ("hosts", "list"),
    ("devices",),
    ("namespaces", "list"),
    ("dead-letters", "list"),
    ("config", "show"),
    ("version",),
]


def timeless(text: str) -> str:
    """The text without figures, such as `1 min 5 s` and measured memory, and without the spaces that align them."""
    return re.sub(r" +", " ", re.sub(r"([\d.]+( s| min| h)? ?)+", "N ", text)).replace(" \n", "\n")


@pytest.fixture
def run_id(arriero: Arriero, database: Database, runs: Runs, tmp_path: Path) -> str:
    """A finished run with long values, beside one of everything that is listed."""
    registry.put(database, "flow", check.parse(FLOW))
    registry.put(database, "flow", check.parse(FLOW.replace("a long text that", "another long text, that")))
    (tmp_path / "nightly.yaml").write_text(SCHEDULE)
    arriero("schedules", "put", tmp_path / "nightly.yaml")
    worker = StepWorker(runs)
    made = str(runs.submit(Submission(check.parse(FLOW), {"text": LONG}, 1)).id)
    worker.send_event(made, "ok", {"approved": True, "comment": LONG})
    worker.work()
    return made


def test_nothing_is_wrapped(arriero: Arriero, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, ...], set[tuple[str, str]]] = {}
    for environment in ENVIRONMENTS:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            for command in COMMANDS:
                ended = arriero(*(run_id if part == "RUN" else part for part in command))
                assert "\x1b" not in ended.output, command
                seen.setdefault(command, set()).add((timeless(ended.stdout), timeless(ended.stderr)))
    assert {command: outputs for command, outputs in seen.items() if len(outputs) > 1} == {}


def test_a_long_value_is_one_line(arriero: Arriero, run_id: str) -> None:
    for command in ("watch", "show"):
        assert LONG.strip() in [line.strip() for line in arriero("runs", command, run_id).stdout.splitlines()]
    document: Any = json.loads(arriero("runs", "show", run_id, "--json").stdout)
    assert document["output"]["text"] == LONG
