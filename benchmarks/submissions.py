"""
Submissions at once: how long clients wait that all submit in the same instant, and whether anybody is refused.

An API process on embedded servers, and clients that each have a connection, and then submit a run of their own at once.
No worker runs: what is measured is the answer of the API. The clients are in a process of their own.

`python -m benchmarks.submissions [--quick] [--clients N] [--rounds N] [--json FILE]`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import psutil
from pydantic import SecretStr

from app.kernel import clock, embedded, log
from app.kernel.database import Database
from app.kernel.processes.process import Child
from app.kernel.sections.servers import ApiSettings, LogSettings
from app.kernel.settings import Settings, environment_of

ROOT = Path(__file__).parents[1]
#: Seconds within which everything is answered, or has failed.
_PATIENCE = 120.0
_BODY = {
    "definition": {
        "workflow": "submissions",
        "inputs": {"text": {"type": "string"}},
        "defaults": {"model": "smollm2:135m"},
        "steps": [
            {"id": "read", "kind": "generate", "prompt": "Read: {{ inputs.text }}", "max_tokens": 20},
            {"id": "answer", "kind": "generate", "prompt": "Answer: {{ steps.read.output }}", "needs": ["read"]},
            {"id": "both", "kind": "join", "needs": ["read", "answer"]},
        ],
    },
    "inputs": {"text": "Where is my parcel? " * 20},
}


@dataclass(frozen=True, slots=True)
class Round:
    """What became of one round."""

    clients: int
    #: How often each status was answered.
    statuses: dict[int, int]
    #: Seconds from the first byte sent to the answer.
    p50: float
    p99: float
    slowest: float
    #: Seconds of processor time that the API took for each.
    cpu: float
    #: Of the machine, before the round.
    load: float


@dataclass(frozen=True, slots=True)
class Served:
    """The API process."""

    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """Seconds of processor time that it has taken."""
        times = self.process.cpu_times()
        return times.user + times.system


async def at_once(served: Served, clients: int, body: bytes) -> Round:
    """So many clients connect, wait for each other, and submit."""
    load, cpu = os.getloadavg()[0], served.cpu()
    start = asyncio.Barrier(clients)

    async def submit() -> tuple[int, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        try:
            await start.wait()
            begun = time.perf_counter()
            writer.write(
                b"POST /v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            answer = await reader.read()
            return int(answer.split(b" ", 2)[1]), time.perf_counter() - begun
        finally:
            writer.close()

    async with asyncio.timeout(_PATIENCE):
        answers = await asyncio.gather(*(submit() for _ in range(clients)))
    times = sorted(took for _, took in answers)
    return Round(
        clients=clients,
        statuses=dict(Counter(status for status, _ in answers)),
        p50=statistics.median(times),
        p99=times[math.ceil(len(times) * 0.99) - 1],
        slowest=times[-1],
        cpu=(served.cpu() - cpu) / clients,
        load=load,
    )


@contextmanager
def api(directory: Path) -> Iterator[Served]:
    """An API process on servers of its own."""
    with (
        embedded.DataDirectory(directory, now=clock.now(), command="benchmarks.submissions") as held,
        embedded.started(held) as servers,
    ):
        assert servers.postgres is not None
        assert servers.valkey is not None
        database = Database(servers.postgres.url, pool_size=1)
        database.upgrade()
        database.close()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        settings = Settings(
            data_dir=directory,
            database_url=SecretStr(servers.postgres.url),
            redis_url=SecretStr(servers.valkey.url),
            api=ApiSettings(port=port),
            log=LogSettings(level="warning"),
        )
        child = Child(
            "api",
            [sys.executable, "-m", "app", "api"],
            environment=environment_of(settings),
            log_file=directory / "api.log",
            pid_file=directory / "api.pid",
            directory=ROOT,
        )
        child.start()
        try:
            asyncio.run(_ready(child, port))
            assert child.pid is not None
            yield Served(port, psutil.Process(child.pid))
        finally:
            child.stop(timedelta(seconds=10))


async def _ready(child: Child, port: int) -> None:
    async with asyncio.timeout(_PATIENCE):
        while True:
            assert child.alive, child.log_tail()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args(arguments)
    log.configure(LogSettings(level="warning"))
    body = json.dumps(_BODY).encode()
    rounds = []
    with tempfile.TemporaryDirectory(prefix="arriero-submissions-") as directory:
        Path(directory).chmod(0o711)
        with api(Path(directory)) as served:
            asyncio.run(at_once(served, 10, body))
            for _ in range(2 if given.quick else given.rounds):
                rounds.append(asyncio.run(at_once(served, given.clients, body)))
                one = rounds[-1]
                sys.stdout.write(
                    f"{one.clients} at once: {one.statuses}, p50 {one.p50:.2f} s, p99 {one.p99:.2f} s, "
                    f"slowest {one.slowest:.2f} s, CPU of the API {one.cpu * 1000:.1f} ms each (load {one.load:.1f})\n"
                )
    median = statistics.median(one.p99 for one in rounds)
    sys.stdout.write(f"p99, median of the rounds: {median:.2f} s\n")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in rounds], indent=2))


if __name__ == "__main__":
    main()
