"""A split and a shadow in a real installation: a real model answers, is compared with itself, and judges itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.live.conftest import MODEL, PATIENCE, ROOT, Live, until

pytestmark = pytest.mark.slow

SHADOW = f"""
shadow: brief
model: {MODEL}
share: 1.0
candidate: {{set: {{max_tokens: 3, temperature: 0}}}}
compare: {{judge: "{MODEL}"}}
pairs: 3
"""


def ask(live: Live, text: str) -> httpx2.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 16, "user": "ana"}
    found = httpx2.post(f"{live.api}/v1/chat/completions", json=body, timeout=PATIENCE)
    assert found.status_code == 200, found.text
    return found


def test_a_candidate_does_calls_again_and_is_compared(live: Live, tmp_path: Path) -> None:
    file, page = tmp_path / "shadow.yaml", tmp_path / "report.html"
    file.write_text(SHADOW)
    assert "does 100.0%" in live.arriero("shadow", "start", str(file)).stdout
    asked = [ask(live, f"Count to {number}.") for number in (3, 4, 5)]

    def report() -> dict[str, object] | None:
        found = httpx2.get(f"{live.api}/v1/shadows/brief", timeout=30).json()
        return found if found["compared"] == 3 else None

    found = until(report)
    assert found["skipped"] == {}
    assert {one["metric"]: one["pairs"] for one in found["metrics"]}["tokens_out"] == 3
    assert sum(found["preferences"].values()) == 3
    pairs = httpx2.get(f"{live.api}/v1/shadows/brief/pairs", timeout=30).json()["pairs"]
    assert {one["run"] for one in pairs} == {answer.headers["X-Arriero-Run"] for answer in asked}
    candidate = live.run(pairs[0]["candidate_run"])
    assert (candidate["priority"], candidate["labels"]["shadow_of"]) == ("batch", pairs[0]["run"])
    until(lambda: httpx2.get(f"{live.api}/v1/shadows/brief", timeout=30).json()["state"] == "complete")
    assert "tokens_out" in live.arriero("shadow", "report", "brief").stdout
    live.arriero("shadow", "report", "brief", "--html", str(page))
    assert "<td>tokens_out</td>" in page.read_text()
    assert "complete" in live.arriero("shadow", "status").stdout
    live.arriero("shadow", "remove", "brief")


def test_two_models_answer_side_by_side(live: Live) -> None:
    command = [sys.executable, "-m", "app", f"--data-dir={live.folder}", f"--set=api.url={live.api}", "shadow"]
    command += ["--interactive", "--model", MODEL, "--candidate", MODEL, "--max-tokens", "6"]
    done = subprocess.run(
        command,
        input="Count to two.\nx\nl\n\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "left was" in done.stderr
    assert f"{MODEL}: 1" in done.stderr
    assert "left" in done.stdout
    assert "--model" in live.arriero("shadow", "--interactive", expect=2).stderr


def test_a_split_is_sticky_and_shown(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "split.yaml"
    split = {
        "split": "short",
        "model": MODEL,
        "candidates": [{"name": "b", "set": {"max_tokens": 2}}],
        "pins": [{"variant": "b", "users": ["ana"]}],
        "ramp": [{"share": 0.5}],
    }
    file.write_text(json.dumps(split))
    assert "50.0% for each candidate" in live.arriero("splits", "start", str(file)).stdout
    answer = ask(live, "Hello, who are you?")
    assert answer.headers["X-Arriero-Reason"] == "split short: b"
    assert answer.json()["usage"]["completion_tokens"] == 2
    run = answer.headers["X-Arriero-Run"]
    until(lambda: live.run(run).get("state") == "succeeded")
    assert "0.25" in live.arriero("runs", "score", run, "helpful", "0.25", "--comment", "cut").stdout

    def scored() -> bool:
        variants = httpx2.get(f"{live.api}/v1/splits/short", timeout=30).json()["variants"]
        return [one["score"] for one in variants if one["name"] == "b"] == [0.25]

    until(scored)
    assert "short of" in live.arriero("splits", "show", "short").stdout
    assert "1000 units" not in live.arriero("splits", "size", "0.05", "--base", "0.7").stdout
    live.arriero("splits", "stop", "short")
    assert "stopped" in live.arriero("splits", "list").stdout
    live.arriero("splits", "remove", "short")


def test_a_version_is_tried_on_the_cases_of_runs(live: Live, tmp_path: Path) -> None:
    cases, checks, calls = tmp_path / "cases.jsonl", tmp_path / "checks.yaml", tmp_path / "calls.jsonl"
    flow = {"workflow": "shout", "inputs": {"text": {"type": "string"}}, "outputs": {"said": "steps.say.output"}}
    for cel in ("inputs.text + '!'", "inputs.text + inputs.text + '!'"):
        body = {**flow, "steps": [{"id": "say", "kind": "transform", "cel": cel}]}
        assert httpx2.put(f"{live.api}/v1/workflows/shout", json=body, timeout=30).is_success
    for text, label in (("a", "evaluation"), ("b", "evaluation"), ("private", "none")):
        body = {"workflow": "shout", "version": 1, "inputs": {"text": text}, "labels": {"consent": label}}
        live.until_ended(httpx2.post(f"{live.api}/v1/runs", json=body, timeout=30).json()["id"])

    assert "2 cases" in live.arriero("dataset", str(cases), "--workflow", "shout").stderr
    assert "private" not in cases.read_text()
    checks.write_text(
        "[{name: as before, that: output == expected}, {name: loud, that: 'output.said.endsWith(\"!\")'}]"
    )
    same = ["evaluate", str(cases), "--workflow", "shout", "--checks", str(checks)]
    first = json.loads(live.arriero(*same, "--version", "1", "--json").stdout)
    assert (first["pass_rate"], [one["passed"] for one in first["checks"]]) == (1.0, [2, 2])
    changed = live.arriero(*same, "--version", "2", expect=1).stdout
    assert "0.0% passed" in changed
    assert "as before" in changed
    live.arriero(*same, "--version", "2", "--require", "0")

    line = {"request": {"messages": [{"role": "user", "content": "Hello"}]}, "output": "Hi"}
    calls.write_text(json.dumps(line) + "\n")
    tried = live.arriero("evaluate", str(calls), "--model", MODEL, "--set", "max_tokens=4", "--json").stdout
    assert json.loads(tried)["cases"] == 1
    assert "no field" in live.arriero("evaluate", str(calls), "--model", MODEL, "--set", "x=1", expect=2).stderr
    assert "have no inputs" in live.arriero("evaluate", str(calls), "--workflow", "shout", expect=2).stderr
