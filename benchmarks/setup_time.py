"""
Set-up: how long a fresh clone takes until `make setup` has made its environment, cold, warm and again.

It clones the repository of the working directory and runs `make setup` there three times: with an empty cache of pip,
so that everything is downloaded and llama.cpp is compiled; in a new environment with the cache that this has left; and
once more, when nothing is to be done. For each it reports the time of the clock and of the processors, and what pip and
the compiler said of their parts. The time of the clock depends on what else the machine does, that of the processors
much less.

`python -m benchmarks.setup_time [--target setup] [--cache FOLDER] [--json FILE]`; the cold set-up needs some minutes
and 76 MB of llama.cpp's sources, and with ccache in the path its cache is used as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

_PART = re.compile(r"^(compiled|installed) in (\d+):(\d\d)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SetupTime:
    """Seconds of one `make setup`."""

    name: str
    wall: float
    #: Of all its processes, in user and system mode.
    cpu: float
    #: Of the build of llama.cpp and of the installation, as they print them; 0 without one.
    compiled: int
    installed: int


def measure(name: str, clone: Path, cache: Path, target: str) -> SetupTime:
    """Run `make` once. Raises CalledProcessError when it fails."""
    environment = {**os.environ, "PIP_CACHE_DIR": str(cache), "MAKEFLAGS": ""}
    environment.pop("VIRTUAL_ENV", None)
    before, began = os.times(), time.monotonic()
    done = subprocess.run(["make", target], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - began, os.times()
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise subprocess.CalledProcessError(done.returncode, done.args)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    parts = {what: int(minutes) * 60 + int(seconds) for what, minutes, seconds in _PART.findall(done.stderr)}
    return SetupTime(name, wall, cpu, parts.get("compiled", 0), parts.get("installed", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="setup", help="the target of make")
    parser.add_argument("--cache", type=Path, help="keeps pip's cache of this in a folder that does not exist yet")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="arriero-setup-") as folder:
        clone, cache = Path(folder, "clone"), arguments.cache or Path(folder, "cache")
        if cache.exists():
            parser.error(f"{cache} exists: a cold set-up has no cache")
        subprocess.run(["git", "clone", "--quiet", str(Path.cwd()), str(clone)], check=True)
        found = [measure("cold", clone, cache, arguments.target)]
        shutil.rmtree(clone / ".venv")
        found.append(measure("warm", clone, cache, arguments.target))
        found.append(measure("again", clone, cache, arguments.target))
    table = Table("set-up", "s", "s of processors", "llama.cpp, s", "packages, s")
    for one in found:
        table.add_row(one.name, f"{one.wall:.0f}", f"{one.cpu:.0f}", str(one.compiled), str(one.installed))
    Console().print(table)
    Console().print(
        f"{os.cpu_count()} cores; ccache: {shutil.which('ccache') or 'none'}; load {os.getloadavg()[0]:.1f}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
