"""An installation as a user has it: `arriero up` as a process, seen from outside by pid files, HTTP and its servers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from app.kernel import embedded
from app.kernel.database import Database
from app.kernel.processes import pid_file
from tests.faults.conftest import ROOT, shown, until

_ENTRY = """
[[models]]
name = "{name}"
use_cases = ["chat"]
source = {{ path = "/nowhere/{name}.gguf" }}
simulated = {{ bytes = "600MiB", load = "{load}", tokens_per_second = 40 }}
"""


def catalogue(*names: str, load: str = "100ms") -> str:
    """Entries of stand-ins, of which a simulated device of 1 GiB holds one at a time."""
    return "".join(_ENTRY.format(name=name, load=load) for name in names)


@contextmanager
def up(data_dir: Path, said: Path, settings: Mapping[str, Any], catalog: str) -> Iterator[subprocess.Popen[bytes]]:
    """`arriero up` with these settings and models; it adds what it says to a file."""
    file = said.with_name("catalog.toml")
    file.write_text(catalog)
    chosen = {"api.port": "0", "catalog.files": str(file), **settings}
    options = [f"--set={key}={value}" for key, value in chosen.items()]
    command = [sys.executable, "-m", "app", "--data-dir", str(data_dir), *options, "up", "--no-flower"]
    with said.open("ab") as output, ExitStack() as stack:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        try:
            yield process
        finally:
            shown(said.name, said.read_text())


def is_up(process: subprocess.Popen[bytes], said: Path, *, times: int = 1) -> bool:
    """Whether it says that everything is up; in a file that several wrote, as often as that."""
    assert process.poll() is None, said.read_text()
    return said.read_text().count("arriero is up") >= times


def pids(data_dir: Path) -> dict[str, int]:
    """The processes of the tree, by name, as their pid files tell; pools are `pool ID`."""
    servers = [data_dir / "postgres" / "server.pid", data_dir / "valkey" / "server.pid"]
    files = [*(data_dir / "run").glob("*.pid"), *servers]
    found = {record.name: record.pid for file in files if (record := pid_file.find(file)) is not None}
    for file in (data_dir / "run" / "pools").glob("*.pid"):
        if (record := pid_file.find(file)) is not None:
            found[f"pool {file.stem}"] = record.pid
    return found


def members(data_dir: Path) -> dict[str, int]:
    """The processes of the tree without pools."""
    return {name: pid for name, pid in pids(data_dir).items() if not name.startswith("pool ")}


def address(data_dir: Path) -> str:
    """Where the API listens."""
    api = psutil.Process(json.loads((data_dir / "run" / "api.pid").read_text())["pid"])
    return f"http://127.0.0.1:{api.environ()['ARRIERO_API__PORT']}"


def database_of(data_dir: Path) -> Database:
    """The installation's database, for looking."""
    url = embedded.find_postgres_url(data_dir)
    assert url is not None, "it is up"
    return Database(url, pool_size=2)


def with_children(pid: int) -> Sequence[int]:
    """A process and those that it has started, but for pools: what freezes together."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        children = [child.pid for child in process.children(recursive=True) if "pool" not in child.cmdline()]
        return [pid, *children]
    return [pid]


def signalled(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone, and to what it has started."""
    for one in with_children(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, number)


def killed(pid: int) -> None:
    """Kill a process alone; it is gone when this returns."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until(lambda: pid_file.birth(pid) is None)
