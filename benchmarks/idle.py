"""
Idle: what `arriero up` takes while nothing runs, and how long it takes to start.

It starts `arriero up` on a new data directory and on the same one again, and takes the times until the first line,
until it is ready, and until the first token of a run of one step, with the processor time of all of its processes. Then
it waits until the installation is idle, and reports for each process its memory (PSS counts a shared page once) and the
processor time that it uses meanwhile.

`python -m benchmarks.idle [--seconds 60] [--starts 1] [--no-flower] [--json FILE]`, on Linux only
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import psycopg
from rich.console import Console
from rich.table import Table

from app.kernel import embedded

#: Seconds between the end of the first run and the measurement: pools of connections and caches have settled then.
SETTLE = 30.0
_TICK = os.sysconf("SC_CLK_TCK")
_WORKFLOW = {
    "workflow": "first-token",
    "steps": [{"id": "say", "kind": "generate", "model": "smollm2:135m", "prompt": "Hello", "max_tokens": 1}],
}


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the start of `arriero up`, and the processor time of all processes until the first token."""

    directory: str
    first_line: float
    ready: float
    first_token: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Process:
    """A process while the installation is idle. Bytes, and seconds of processor time."""

    name: str
    pid: int
    threads: int
    rss: int
    pss: int
    cpu: float


class Installation:
    """A running `arriero up`."""

    def __init__(self, directory: Path, *, flower: bool) -> None:
        self.directory = directory
        self._began = time.monotonic()
        self._lines: list[tuple[float, str]] = []
        self._ready = threading.Event()
        self._ended = threading.Event()
        self.url = f"http://127.0.0.1:{_free_port()}"
        environment = os.environ | {
            "ARRIERO_DATA_DIR": str(directory),
            "ARRIERO_API__PORT": self.url.rpartition(":")[2],
            "ARRIERO_FLOWER__PORT": "0",
        }
        command = [sys.executable, "-m", "app", "up", *([] if flower else ["--no-flower"])]
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr is not None, "it is a pipe"
        for line in self._process.stderr:
            self._lines.append((time.monotonic() - self._began, line))
            if "arriero is up" in line:
                self._ready.set()
        self._ended.set()
        self._ready.set()

    def measure_start(self, name: str) -> Start:
        """Submit a run as soon as the API accepts one, and return the times of the start."""
        with httpx2.Client(base_url=self.url, timeout=30.0, trust_env=False) as client:
            run = self._submit(client)
            while run["state"] not in ("succeeded", "failed", "cancelled"):
                time.sleep(0.02)
                run = client.get(f"/v1/runs/{run['id']}").json()
        first_token, cpu = time.monotonic() - self._began, sum(_spent(one) for one in self.processes())
        if run["state"] != "succeeded":
            raise SystemExit(f"the run did not succeed: {run['error']}")
        self._ready.wait(300)
        if self._ended.is_set():
            raise SystemExit("arriero up ended: " + "".join(line for _, line in self._lines))
        ready = next(at for at, line in self._lines if "arriero is up" in line)
        return Start(name, self._lines[0][0], ready, first_token, cpu)

    def _submit(self, client: httpx2.Client) -> dict[str, Any]:
        while not self._ended.is_set():
            try:
                answer = client.post("/v1/runs", json={"definition": _WORKFLOW})
            except httpx2.TransportError:
                time.sleep(0.02)
                continue
            if answer.status_code != 503:
                if answer.is_error:
                    raise SystemExit(f"the run was refused: {answer.text}")
                found: dict[str, Any] = answer.json()
                return found
            time.sleep(0.02)
        raise SystemExit("arriero up ended: " + "".join(line for _, line in self._lines))

    def processes(self) -> list[psutil.Process]:
        """Return all of its processes."""
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def measure_idle(self, seconds: float) -> list[Process]:
        """Return what each process takes in so many seconds."""
        before = {one.pid: _spent(one) for one in self.processes()}
        time.sleep(seconds)
        found = []
        for one in self.processes():
            with one.oneshot():
                rss, pss = one.memory_info().rss, _pss(one.pid)
                cpu = _spent(one) - before.get(one.pid, 0.0)
                found.append(Process(_name(one), one.pid, one.num_threads(), rss, pss, cpu))
        return sorted(found, key=lambda process: (-process.pss, process.pid))

    def connections(self) -> dict[str, int]:
        """Return the number of sessions of Postgres, without the one that counts, by the kind of their process."""
        url = embedded.find_postgres_url(self.directory)
        assert url is not None, "it runs"
        with psycopg.connect(url) as connection:
            counted = connection.execute(
                "SELECT backend_type, count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() GROUP BY 1"
            ).fetchall()
        return dict(counted)

    def stop(self) -> None:
        """Stop it, and wait for its end."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)


@contextmanager
def installed(directory: Path, *, flower: bool) -> Iterator[Installation]:
    """Run an installation, which is stopped at the end."""
    running = Installation(directory, flower=flower)
    try:
        yield running
    finally:
        running.stop()


def _spent(process: psutil.Process) -> float:
    """Seconds of processor time of a process and of its ended children."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _name(process: psutil.Process) -> str:
    """A short name of a process, from its command line."""
    words = process.cmdline()
    if "-m" in words[:3] and len(words) > words.index("-m") + 2:
        return f"arriero {words[words.index('-m') + 2]}"
    if words and words[0].startswith("postgres: "):
        return " ".join(words[0].split()[:3])
    return " ".join([Path(words[0]).name, *words[1:2]])[:40] if words else process.name()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--no-flower", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    starts: list[Start] = []
    idle: list[Process] = []
    connections: Mapping[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="arriero-idle-", ignore_cleanup_errors=True) as folder:
        for number in range(options.starts):
            directory = Path(folder) / str(number)
            last = number == options.starts - 1
            with installed(directory, flower=not options.no_flower) as running:
                starts.append(running.measure_start("cold"))
            with installed(directory, flower=not options.no_flower) as running:
                starts.append(running.measure_start("warm"))
                if last and options.seconds:
                    time.sleep(SETTLE)
                    idle = running.measure_idle(options.seconds)
                    connections = running.connections()
    _print(starts, idle, connections, options.seconds)
    if options.json:
        found = {
            "seconds": options.seconds,
            "starts": [asdict(one) for one in starts],
            "idle": [asdict(one) for one in idle],
            "connections": dict(connections),
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _print(starts: list[Start], idle: list[Process], connections: Mapping[str, int], seconds: float) -> None:
    console = Console()
    table = Table("directory", "first line", "ready", "first token", "processor time", title="Start, in seconds")
    for start in starts:
        figures = (start.first_line, start.ready, start.first_token, start.cpu)
        table.add_row(start.directory, *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    if not idle:
        return
    table = Table("process", "threads", "RSS, MB", "PSS, MB", "% of a core", title=f"Idle, over {seconds:g} s")
    for one in idle:
        table.add_row(
            one.name,
            str(one.threads),
            f"{one.rss / 1e6:.1f}",
            f"{one.pss / 1e6:.1f}",
            f"{100 * one.cpu / seconds:.2f}",
        )
    table.add_section()
    table.add_row(
        f"{len(idle)} processes",
        str(sum(one.threads for one in idle)),
        f"{sum(one.rss for one in idle) / 1e6:.0f}",
        f"{sum(one.pss for one in idle) / 1e6:.0f}",
        f"{100 * sum(one.cpu for one in idle) / seconds:.2f}",
    )
    console.print(table)
    console.print("Postgres: " + ", ".join(f"{count} {kind}" for kind, count in connections.items()))


if __name__ == "__main__":
    main()
