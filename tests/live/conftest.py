"""Fixtures of the live tests: a running `arriero up` on its own data directory, with a real model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
MODEL = "smollm2:135m"
#: Its greedy answer is the same in every batch: each of the first 12 tokens leads by over a logit, and a batch of
#: another shape changes one by up to 0.6 (docs/engine.md).
LETTERS = [{"role": "user", "content": "Repeat: A B C D E F G H I J K L M N"}]

#: Most seconds for any condition, on a loaded machine.
PATIENCE = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Poll a condition every 50 ms until it is true, and return its value. Fails at the deadline."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"the condition was not true within {seconds:g} s")


@dataclass(frozen=True)
class Live:
    """A running `arriero up`."""

    folder: Path
    api: str
    flower: str
    log: Path
    process: subprocess.Popen[bytes]

    def arriero(self, *arguments: str, expect: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "app",
            f"--data-dir={self.folder}",
            f"--set=api.url={self.api}",
            *arguments,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=PATIENCE, check=False
        )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, definition: dict[str, Any], **inputs: Any) -> str:
        answer = httpx2.post(f"{self.api}/v1/runs", json={"definition": definition, "inputs": inputs}, timeout=30)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def run(self, run_id: str) -> Any:
        return httpx2.get(f"{self.api}/v1/runs/{run_id}", timeout=30).json()

    def until_ended(self, run_id: str, seconds: float = PATIENCE) -> Any:
        """Wait until a run has ended, and return it. The run of a direct call is recorded a moment after its answer."""
        final = {"succeeded", "failed", "cancelled"}
        return until(lambda: found if (found := self.run(run_id)).get("state") in final else None, seconds)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("live")) as tree:
        yield tree


@contextmanager
def running(folder: Path, *more: str) -> Iterator[Live]:
    """Run `arriero up` with its data in a folder. `more` are further options."""
    api, flower = free_port(), free_port()
    log = folder / "up.log"
    options = [f"--data-dir={folder}", f"--set=api.port={api}", f"--set=flower.port={flower}", *more]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", *options, "up"], stdout=out, stderr=out, cwd=ROOT, start_new_session=True
        )
    tree = Live(folder, f"http://127.0.0.1:{api}", f"http://127.0.0.1:{flower}", log, process)
    try:
        until(lambda: "arriero is up" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield tree
    finally:
        process.terminate()
        try:
            code = process.wait(PATIENCE)
        finally:
            process.kill()
    assert code == 0, log.read_text()
    assert not list((folder / "run").glob("*.pid")), "everything was stopped"


def generate(prompt: str, **more: Any) -> dict[str, Any]:
    """A workflow of one `generate` step."""
    step = {"id": "ask", "kind": "generate", "model": MODEL, "prompt": prompt, **more}
    return {"workflow": "ask", "inputs": {"text": {"type": "string", "default": ""}}, "steps": [step]}


def as_json(text: str) -> Any:
    return json.loads(text)
