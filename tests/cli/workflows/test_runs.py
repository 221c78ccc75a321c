"""`arriero runs` with a running API."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from app.kernel.errors import InvalidInput
from app.kernel.sections.servers import ApiSettings
from app.kernel.settings import Settings
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.cli.conftest import Arriero
from tests.workflows.conftest import StepWorker

FLOW = "workflow: flow\ndefaults: {model: 'm:1'}\nsteps: [{id: a, kind: generate, prompt: hi}]\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of an API that includes only short values in its answers."""
    return Settings(data_dir=tmp_path, api=ApiSettings(max_inline_bytes=10))


@pytest.fixture
def arriero(arriero: Arriero) -> Arriero:
    """`arriero runs`."""
    return partial(arriero, "runs")


def test_a_long_output_is_printed_completely(arriero: Arriero, runs: Runs) -> None:
    worker = StepWorker(runs)
    run_id = str(runs.submit(Submission(check.parse(FLOW), {})).id)
    worker.work(a="a long text")

    assert json.loads(arriero("output", run_id).stdout) == {"a": "a long text"}
    assert json.loads(arriero("output", run_id, "--step", "a").stdout) == "a long text"
    assert json.loads(arriero("watch", run_id, "--json").stdout)["output"] == {"a": "a long text"}
    shown = json.loads(arriero("show", run_id, "--json").stdout)
    assert (shown["output"], shown["steps"][0]["output"]["$payload"]["bytes"]) == ({"a": "a long text"}, 13)
    assert "a long text" in arriero("show", run_id).stdout


def test_a_run_uses_other_models_for_all_steps_or_for_one(arriero: Arriero, tmp_path: Path) -> None:
    file = tmp_path / "flow.yaml"
    steps = "[{id: a, kind: generate, prompt: hi}, {id: b, kind: generate, prompt: hi}]"
    file.write_text(f"workflow: flow\nsteps: {steps}\n")
    submit = partial(arriero.func, "submit", file, "--json")  # type: ignore[attr-defined] # the fixture is a partial
    found = json.loads(submit("--model", "smollm2:135m", "--model", "b=qwen3:0.6b").stdout)
    assert [step["model"] for step in found["steps"]] == ["smollm2:135m", "qwen3:0.6b"]
    with pytest.raises(InvalidInput, match=r"models\.c: no step 'c' uses a model; accepted: a, b"):
        submit("--model", "c=qwen3:0.6b", "--model", "smollm2:135m")
