"""`arriero self-check`: what is installed is tried, and each problem is named with what to do."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.cli.doctor import installed
from app.kernel.settings import Settings

KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"


def settings(folder: Path, **values: Any) -> Settings:
    return Settings(data_dir=folder, **values)


@pytest.mark.slow
def test_it_tries_the_engine_and_servers_of_its_own_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    arguments = ["--data-dir", str(tmp_path / "data"), "--set", "api.port=0", "--set", "flower.port=0"]
    result = CliRunner().invoke(app, [*arguments, "self-check", "--json"])
    found = json.loads(result.stdout)
    bad = [one for one in found["findings"] if one["severity"] == "problem" and one["check"] not in ("disk", "drivers")]
    assert bad == []
    said = {one["check"]: one["detail"] for one in found["findings"]}
    assert "loaded a model of" in said["engine"]
    assert "generated 16 tokens" in said["engine"]
    servers = [one["detail"] for one in found["findings"] if one["check"] == "servers"]
    assert ["Postgres" in servers[0], "Valkey" in servers[1]] == [True, True]
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "data").exists(), "it changes nothing"


def test_a_package_of_another_version_and_a_missing_one_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    required = ["celery>=99", "no-such-package>=1", "typer>=0.1", 'other>=1; extra == "mail"']
    monkeypatch.setattr("importlib.metadata.requires", lambda _: required)
    first, second, extras = installed.packages(settings(tmp_path))
    assert first.detail.startswith("celery is 5.")
    assert first.detail.endswith(">=99 is needed")
    assert second.detail == "no-such-package is not installed; >=1 is needed"
    assert "pip install" in first.remedy
    assert extras.detail.startswith("extras: none of")


def test_another_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    (finding,) = installed.python(settings(tmp_path))
    assert finding.severity == "problem"
    assert "3.9.1" in finding.detail
    assert ">=3.11 is needed" in finding.detail


def test_an_engine_that_dies_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, said in ((KILLED, "built for another machine"), ("raise SystemExit('no such library')", "no such")):
        monkeypatch.setattr(installed, "_SELF_TEST", (sys.executable, "-c", program))
        (finding,) = installed.engine(settings(tmp_path))
        assert finding.severity == "problem"
        assert said in finding.detail
        assert "llama-cpp-python" in finding.remedy


def test_a_port_in_use_is_named_with_its_holder(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first, second = installed.ports(settings(tmp_path, api={"port": port}, flower={"port": 0}))
    assert first.severity == "problem"
    assert f"port {port}" in first.detail
    assert str(os.getpid()) in first.detail
    assert "ARRIERO_API__PORT" in first.remedy
    assert second.severity == "ok"


def test_the_shipped_files_are_there_and_missing_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = installed.shipped_files(settings(tmp_path))
    assert whole.severity == "ok"
    monkeypatch.setattr("app.workflows.registry.shipped", dict)
    (finding,) = installed.shipped_files(settings(tmp_path))
    assert finding.detail == "the installation has no workflows"
