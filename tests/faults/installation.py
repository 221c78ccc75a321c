"""An installation: `arriero up` as a process, observed through its pid files, its API and its servers."""

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
from tests.faults.conftest import ROOT, is_pool, show_section, until

_ENTRY = """
[[models]]
name = "{name}"
use_cases = ["chat"]
source = {{ path = "/nowhere/{name}.gguf" }}
simulated = {{ bytes = "600MiB", load = "{load}", tokens_per_second = 40 }}
"""


def catalog_of(*names: str, load: str = "100ms") -> str:
    """Catalogue entries of simulated models; a simulated device of 1 GiB fits one at a time."""
    return "".join(_ENTRY.format(name=name, load=load) for name in names)


@contextmanager
def up(
    data_dir: Path,
    output: Path,
    settings: Mapping[str, Any],
    catalog: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """
    Run `arriero up` with these settings and models; its output is appended to a file.

    `environment` replaces that of this process.
    """
    file = output.with_name("catalog.toml")
    file.write_text(catalog)
    values = {"api.port": "0", "catalog.files": str(file), **settings}
    options = [f"--set={key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "app", "--data-dir", str(data_dir), *options, "up", "--no-flower"]
    with output.open("ab") as stream, ExitStack() as stack:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=ROOT, start_new_session=True,
            env=None if environment is None else dict(environment),
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        try:
            yield process
        finally:
            show_section(output.name, output.read_text(errors="replace")[-20_000:])


def is_up(process: subprocess.Popen[bytes], output: Path, *, times: int = 1) -> bool:
    """Whether the output reports at least `times` that everything is up. Fails when the process has ended."""
    assert process.poll() is None, output.read_text()
    return output.read_text().count("arriero is up") >= times


def pids(data_dir: Path) -> dict[str, int]:
    """The process ids of the tree, by name, from the pid files; pools are named `pool ID`."""
    servers = [data_dir / "postgres" / "server.pid", data_dir / "valkey" / "server.pid"]
    files = [*(data_dir / "run").glob("*.pid"), *servers]
    found = {record.name: record.pid for file in files if (record := pid_file.find(file)) is not None}
    for file in (data_dir / "run" / "pools").glob("*.pid"):
        if (record := pid_file.find(file)) is not None:
            found[f"pool {file.stem}"] = record.pid
    return found


def members(data_dir: Path) -> dict[str, int]:
    """The process ids of the tree without pools, by name."""
    return {name: pid for name, pid in pids(data_dir).items() if not name.startswith("pool ")}


def api_url(data_dir: Path) -> str:
    """The URL of the API."""
    url: str = json.loads((data_dir / "run" / "up.json").read_text())["api"]
    return url


def database_of(data_dir: Path) -> Database:
    """A connection to the database of the installation."""
    url = embedded.find_postgres_url(data_dir)
    assert url is not None, "it is up"
    return Database(url, pool_size=2)


def with_children(pid: int) -> Sequence[int]:
    """A process and its descendants, except pools."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        children = [child.pid for child in process.children(recursive=True) if not is_pool(child)]
        return [pid, *children]
    return [pid]


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and its descendants, except pools. The process may have ended."""
    for one in with_children(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, number)


def kill(pid: int) -> None:
    """Kill a process without its descendants, and wait until it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until(lambda: pid_file.birth(pid) is None)
