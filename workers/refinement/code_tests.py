"""
Code tests: the Python code of an output, run with tests in a confined process.

The process has an empty environment, a temporary directory, a session of its own, and no network; `confinement.py` says
what else it gives up. It is killed at its time limit, or when its directory grows too large.
Where it cannot be confined nothing is run; the reason is a sentence. Only the setting `verification.code_tests` changes
that.

A code that aims at its tests can deceive them: it runs in their process. What it cannot do is reach anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.kernel import ids
from workers.engine import OnStop

#: How code may be run: confined only, with the limits alone where it cannot be confined, or not at all.
CodeIsolation = Literal["confined", "unprotected", "off"]

_PROGRAM = Path(__file__).with_name("confinement.py")
#: Most bytes of what the process reports, of one file that it writes, and of all; most files.
_REPORT, _FILE, _FILES_BYTES, _FILES = 262_144, 1_048_576, 16 * 1_048_576, 64
#: Seconds between two looks at the directory, and seconds that the start of the interpreter may take beside the limit.
_LOOK, _START = 0.05, 10.0
#: Processes at a time.
_SLOTS = threading.BoundedSemaphore(4)


class CodeTestsRefused(Exception):
    """Code cannot be run here; the message is a sentence that says why."""


@dataclass(frozen=True, slots=True)
class CodeRun:
    """What the tests of a code found."""

    #: For each test, what went wrong; None where it passed.
    errors: Sequence[str | None]
    #: Why the code itself could not be run.
    broken: str | None = None


def require_possible(isolation: CodeIsolation) -> None:
    """Raise CodeTestsRefused where code cannot be run."""
    run_tests("", [], 5.0, 64, isolation)


def run_tests(
    code: str,
    tests: Sequence[str],
    seconds: float,
    memory_mb: int,
    isolation: CodeIsolation,
    *,
    on_stop: OnStop = lambda _: None,
) -> CodeRun:
    """
    Run a code with its tests.

    Raises CodeTestsRefused, and CancelledError when it was stopped.
    """
    if isolation == "off":
        raise CodeTestsRefused(
            "code of models is not run in this installation (verification.code_tests is off); remove the code verifier"
        )
    if sys.platform != "linux":
        raise CodeTestsRefused("code of models is run on Linux only: elsewhere it cannot be confined")
    stopped = threading.Event()
    on_stop(stopped.set)
    with _SLOTS, tempfile.TemporaryDirectory(prefix="arriero-code-", ignore_cleanup_errors=True) as directory:
        if os.geteuid() == 0:
            Path(directory).chmod(0o777)
        prefix = ids.new_secret()
        task = {
            "code": code,
            "tests": [{"code": test} for test in tests],
            "prefix": prefix,
            "directory": directory,
            "memory": memory_mb * 1_048_576,
            "seconds": max(1, int(seconds + 0.999)),
            "file_bytes": _FILE,
            "unprotected": isolation == "unprotected",
        }
        found, ended = _run(json.dumps(task).encode(), prefix, directory, seconds, stopped)
    return _result(found, ended, len(tests), isolation)


def _run(
    task: bytes, prefix: str, directory: str, seconds: float, stopped: threading.Event
) -> tuple[list[Mapping[str, Any]], str]:
    """Return what the process reported, and how it ended."""
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_PROGRAM)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd=directory,
        start_new_session=True,
    )
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    report = b""
    reason = ""
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(task)
            process.stdin.close()
        limit = time.monotonic() + _START
        confined = False
        while not reason:
            if select.select([process.stdout], [], [], _LOOK)[0]:
                part = os.read(process.stdout.fileno(), 65_536)
                if not part:
                    break
                report += part
            if not confined and b"\n" in report:
                confined, limit = True, time.monotonic() + seconds
            if stopped.is_set():
                raise CancelledError
            if time.monotonic() > limit:
                reason = f"it was ended after {seconds:g} s" if confined else "its process did not start in time"
            elif len(report) > _REPORT:
                reason = "it reported too much"
            elif not _is_small(directory):
                reason = f"it wrote more than {_FILES} files or {_FILES_BYTES >> 20} MiB"
    finally:
        # With what it has started, which only an unprotected one can.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        code = process.wait()
    if not reason and code != 0:
        reason = f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"
    return _parsed(report[:_REPORT], prefix), reason or "it ended before its tests did"


def _is_small(directory: str) -> bool:
    files = size = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            files += 1
            with contextlib.suppress(FileNotFoundError):
                size += entry.stat(follow_symlinks=False).st_size
            if files > _FILES or size > _FILES_BYTES:
                return False
    return True


def _parsed(report: bytes, prefix: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for line in report.decode("utf-8", "replace").splitlines():
        if line.startswith(prefix):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line.removeprefix(prefix))
                found += [value] if isinstance(value, dict) else []
    return found


def _result(found: Sequence[Mapping[str, Any]], ended: str, tests: int, isolation: CodeIsolation) -> CodeRun:
    for one in found:
        if "refused" in one:
            allowed = "" if isolation == "unprotected" else "; verification.code_tests says what else can be done"
            raise CodeTestsRefused(f"code of models cannot be run here: {one['refused']}{allowed}")
        if "broken" in one:
            return CodeRun([f"the code cannot be run: {one['broken']}"] * tests, str(one["broken"]))
    if not any("confined" in one for one in found):
        raise CodeTestsRefused(f"code of models cannot be run here: {ended}")
    results: dict[int, str | None] = {
        one["test"]: one.get("error") for one in found if isinstance(one.get("test"), int)
    }
    if any("end" in one for one in found):
        return CodeRun([results.get(number, "it was not run") for number in range(tests)])
    # What ended the process is the fault of the first test without a result, and the later ones were not run.
    first = next((number for number in range(tests) if number not in results), tests)
    errors = [results.get(n, ended if n == first else f"it was not run: {ended}") for n in range(tests)]
    return CodeRun(errors)
