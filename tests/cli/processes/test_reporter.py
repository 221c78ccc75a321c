"""The lines of a start: phases with their times, plain where nobody looks, and no obstacle to a stop."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Interrupted, Signals
from tests.faults.conftest import ROOT


def test_piped_lines_are_plain_and_phases_have_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter()
    report.begin("servers", "schema")
    report.done("servers", "Postgres and [Valkey]")
    report.note("models", "m: loading")
    report.show("m: loading 40%")
    report("warning", "control ended\nits log")
    report.done("schema", "x" * 300)
    report.close()

    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"• servers   Postgres and \[Valkey\] \(\d+\.\d s\)", lines[0])
    assert lines[1:4] == ["… models    m: loading", "• control ended", "its log"]
    assert re.fullmatch(r"• schema    x{300} \(\d+\.\d s\)", lines[4])
    assert len(lines) == 5


def test_a_log_has_the_time_before_each_line(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(with_time=True)("warning", "control ended\nits log")

    for line in capsys.readouterr().err.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z ", line)


class ClosedTerminal(io.StringIO):
    """A terminal that is closed."""

    def write(self, text: str) -> int:  # noqa: ARG002 the signature is Python's
        raise OSError(5, "Input/output error")


def test_a_closed_terminal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", ClosedTerminal())
    report = Reporter()
    report.begin("servers")
    report.done("servers", "Valkey")
    report("info", "stopping")
    report.block("arriero is up", ["API"])


def test_only_a_second_request_of_a_person_hurries_a_stop() -> None:
    """The end of a terminal sends SIGHUP more than once."""
    signals = Signals()
    with pytest.raises(Interrupted):
        signals._on_signal(signal.SIGHUP, None)
    signals._on_signal(signal.SIGHUP, None)
    assert not signals.hurry
    signals._on_signal(signal.SIGTERM, None)
    assert signals.hurry


def test_the_first_line_comes_before_the_settings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "arriero.toml"
    file.write_text("nonsense = 1")
    command = [sys.executable, "-m", "app", "--config", str(file), "up"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    first, second, *_ = done.stderr.splitlines()
    assert re.fullmatch(r"arriero \S+ is starting", first)
    assert second.startswith("error: invalid settings")
    assert done.stdout == ""
    assert "is starting" not in subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True).stderr
