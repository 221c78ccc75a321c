"""
Worker programs as forks of one process that has imported their modules, as `arriero up` starts its own.

Each start then takes 0.2 CPU seconds instead of two. `python -m tests.faults.zygote FD` is the process: it sends the
socket of its spawner over FD, and ends when that is closed. Pools that an agent starts are new processes.
"""

from __future__ import annotations

import importlib
import os
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path

from app.cli.processes import preload
from app.cli.processes.member import spawned_child
from app.kernel.processes import forking
from app.kernel.processes.spawning import SpawnedProcess, Spawner, SpawnerClient

ROOT = Path(__file__).parents[2]
#: Most seconds between the end of a program and the look that finds it.
_POLL = 0.05


def main(descriptor: int) -> None:
    """Start what is asked for, until the other end of the descriptor is closed."""
    for module in (*preload.MODULES, "workers.pool.pool"):
        importlib.import_module(module)
    forking.freeze()
    assert forking.is_safe(), "a module has started a thread"
    spawner = Spawner(spawned_child)
    with socket.socket(fileno=descriptor) as channel:
        socket.send_fds(channel, [b"."], [spawner.inherited.fileno()])
        while channel not in select.select([spawner, channel], [], [], _POLL)[0]:
            spawner.serve()


class Zygote:
    """The process, for the tests."""

    def __init__(self) -> None:
        self._channel, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.zygote", str(other.fileno())],
                cwd=ROOT,
                pass_fds=[other.fileno()],
                # The threads of OpenBLAS would begin with the import.
                env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
            )
        _, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
        self._client = SpawnerClient(descriptors[0], lambda: None)
        self._lock = threading.Lock()

    def start(self, name: str, arguments: list[str], environment: dict[str, str], directory: Path) -> SpawnedProcess:
        """Start `python -m` with the arguments. The log and the pid file are in the directory."""
        with self._lock:
            log, file = directory / f"{name}.log", directory / f"{name}.pid"
            made = self._client.start(name, arguments, environment, log, file)
        assert made is not None, f"{name} was not forked"
        return made

    def close(self) -> None:
        """End the process; what it has started continues."""
        self._client.close()
        self._channel.close()
        self._process.wait(30)


if __name__ == "__main__":
    main(int(sys.argv[1]))
