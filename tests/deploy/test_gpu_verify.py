"""`deploy/gpu/verify.sh`: sections that fail or run out of time stop no other, and what they found is in the report."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import gpu_report, gpu_verify
from benchmarks.gpu_report import Findings, Target

SCRIPT = Path(__file__).parents[2] / "deploy/gpu/verify.sh"
TARGET = Target(model="no-such-model.gguf")


def test_a_section_that_fails_is_reported_with_the_end_of_its_output() -> None:
    section = gpu_verify._run("speed", gpu_verify.SECTIONS["speed"], TARGET, [], 120)
    assert section.state == "failed"
    assert "Error" in section.failure
    assert "llama-server" in section.not_run[0], "what it found until then is kept"
    page = gpu_report.markdown([("devices", "1 x none")], [section, replace(section, state="ok", failure="")])
    assert "s, failed" in page
    assert page.count("- Not run: llama-server") == 2


def test_a_section_without_time_is_stopped() -> None:
    section = gpu_verify._run("seen", gpu_verify.SECTIONS["seen"], TARGET, [], 0.05)
    assert section.state == "out of time"
    assert section.seconds < gpu_verify._GRACE


def test_each_finding_is_kept_at_once(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "section.json")
    findings.figure("speed", "1 | 2")
    findings.check("it holds", False, "by far")
    section = gpu_report.read(tmp_path / "section.json", "seen", "Seen")
    assert (section.figures, section.checks) == ([("speed", "1 | 2")], [("it holds", False, "by far")])
    page = gpu_report.markdown([("devices", "1 x none")], [section])
    assert "| speed | 1 \\| 2 |" in page
    assert "| it holds | **no** | by far |" in page
    assert "0 of 1 checks held" in page


def test_a_target_reaches_the_process_of_a_section() -> None:
    target = Target("a.gguf", software=(5, 6), streams=(1, 2), server="x")
    assert Target.of_json(json.dumps(asdict(target))) == target


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "deploy/gpu/verify.sh --carried FOLDER"),
        (["--minutes", "0"], "--minutes is from 1 to 120"),
        (["--minutes", "9; ls"], "--minutes is a whole number"),
        (["--carried"], "--carried needs a value"),
        (["--carried", "/"], "has no folder wheels"),
    ],
)
def test_the_script_says_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
