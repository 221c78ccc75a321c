"""Runs a script in a Python process with one thread, which may be forked; the process of the tests may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
_HEAD = """
import json, os, signal, sys, threading, time
from datetime import timedelta
from pathlib import Path
from app.kernel.processes import forking, pid_file
from app.kernel.processes.process import Child
folder = Path(sys.argv[1])
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}

def child(entry, name="child", **more):
    argv = [sys.executable, "-c", "print('executed')"]
    files = {"log_file": folder / f"{name}.log", "pid_file": folder / f"{name}.pid"}
    return Child(name, argv, **{"environment": ENVIRONMENT, "entry": entry, **files, **more})

def until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)
"""


def run_script(folder: Path, script: str) -> Any:
    """Run a script after a common head; it prints one JSON document, which is returned."""
    command = [sys.executable, "-c", _HEAD + script, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
