"""
Python tools: shipped functions and entry points of the group `arriero.tools`, each call in a process of its own.

Agents call them as tools, `python` steps as functions. They are trusted code of the installation. The process is
killed at the time limit, and when the step is cancelled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from datetime import timedelta
from typing import Any

from app.kernel.errors import FailureReason, StepFailure
from workers.engine import OnStop
from workers.tool_loop.tools import ToolDescription

_PROGRAM = "workers.tool_loop.python_program"
_DESCRIBE_TIMEOUT = timedelta(seconds=60)


def describe(name: str, *, on_stop: OnStop) -> ToolDescription:
    """Return what a tool says about itself. Raises StepFailure, CancelledError."""
    answer = _asked("describe", name, None, "", on_stop, _DESCRIBE_TIMEOUT)
    return ToolDescription(name, answer["description"], answer["parameters"])


def call(name: str, arguments: Mapping[str, Any], call_id: str, *, on_stop: OnStop, timeout: timedelta) -> str:
    """Return the result of a tool as a text or JSON. Raises StepFailure, CancelledError."""
    return str(_called(name, arguments, call_id, on_stop, timeout)["result"])


def value(
    name: str, arguments: Mapping[str, Any], call_id: str, *, on_stop: OnStop, timeout: timedelta, memory_mb: int
) -> Any:
    """Return the result of a function as JSON, of a process with bounded memory. Raises StepFailure, CancelledError."""
    answer = _called(name, arguments, call_id, on_stop, timeout, memory_mb)
    if answer["is_text"]:
        return answer["result"]
    try:
        return json.loads(answer["result"], parse_constant=_refuse_constant)
    except ValueError as error:
        raise StepFailure(FailureReason.INTERNAL, f"the result of {name} is no JSON: {error}") from None


def _called(
    name: str,
    arguments: Mapping[str, Any],
    call_id: str,
    on_stop: OnStop,
    timeout: timedelta,
    memory_mb: int | None = None,
) -> dict[str, Any]:
    answer = _asked("call", name, arguments, call_id, on_stop, timeout, memory_mb)
    if "invalid" in answer:
        raise StepFailure(FailureReason.INVALID_REQUEST, answer["invalid"])
    if "raised" in answer:
        raise StepFailure(FailureReason.INTERNAL, answer["raised"])
    return answer


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _asked(
    action: str,
    name: str,
    arguments: Any,
    call_id: str,
    on_stop: OnStop,
    timeout: timedelta,
    memory_mb: int | None = None,
) -> dict[str, Any]:
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(
        [sys.executable, "-m", _PROGRAM, action, name, call_id, *([] if memory_mb is None else [str(memory_mb)])],
        stdin=pipe,
        stdout=pipe,
        stderr=nothing,
        text=True,
        start_new_session=True,
    )
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(True)
        _kill(child)

    on_stop(stop)
    try:
        out, _ = child.communicate(json.dumps(arguments), timeout=max(timeout.total_seconds(), 0.001))
    except subprocess.TimeoutExpired:
        message = f"the tool {name} did not end within {timeout.total_seconds():g} s"
        raise StepFailure(FailureReason.TIMEOUT, message) from None
    finally:
        _kill(child)
        child.wait()
        for stream in (child.stdin, child.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
    if stopped:
        raise CancelledError
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        message = f"the tool {name} ended with exit code {child.returncode} and without a result"
        raise StepFailure(FailureReason.INTERNAL, message) from None
    if "missing" in answer:
        known = ", ".join(answer["known"]) or "none is installed"
        raise StepFailure(FailureReason.INVALID_REQUEST, f"{answer['missing']}; there are: {known}")
    return answer


def _kill(child: subprocess.Popen[str]) -> None:
    """End the process with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
