"""The faults of a storm: each is a name, and a function that begins it and returns what ends it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import psycopg
import redis

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import pid_file
from tests.faults.installation import kill, send_signal
from tests.faults.storm.proxy import Network
from tests.faults.storm.site import Site

#: Seconds of a freeze or of a cut: shorter than all leases, longer than those of steps, longer than heartbeats.
_SECONDS = (1.0, 6.0, 12.0)
#: Seconds of a full disk and of a wrong clock, and by how much it is wrong.
_DISK_SECONDS, _CLOCK_SECONDS, _STEPS = (3.0, 8.0), (8.0, 15.0), (-7200, -90, 90, 7200)
#: What prevents a replica.
_NO_REPLICA = (
    OSError, AssertionError, subprocess.SubprocessError, psycopg.Error, redis.RedisError, ServerNotStarted
)  # fmt: skip
#: Kinds of processes.
PROCESSES = ("pool", "agent", "control", "api", "Postgres", "Valkey", "up", "second-control", "second-beat")
#: The program alone: its children are processes of other kinds.
_ALONE = frozenset({"up", "agent"})


@dataclass(frozen=True)
class Injected:
    """A fault that has begun: for how many seconds it lasts, and what ends it."""

    name: str
    seconds: float = 0.0
    end: Callable[[], None] = lambda: None


class Injections:
    """All faults that can be caused here."""

    def __init__(self, site: Site, seed: int) -> None:
        self._site, self._chance = site, random.Random(seed)
        self._remaining: list[str] = []
        #: Faults that this machine cannot show, with the reason.
        self.not_run: dict[str, str] = {}
        self.kinds = [f"{how} {who}" for who in PROCESSES for how in ("kill", "freeze")]
        self.kinds += [f"{how} {who}" for who in ("Postgres", "Valkey") for how in ("hang", "drop")]
        self.kinds += ["flush Valkey", "fail-over Postgres", "fail-over Valkey"]
        if site.has_disk:
            self.kinds.append("disk full")
        else:
            self.not_run["disk full"] = "needs root, and the right to mount a disk of memory"
        if site.has_clock:
            self.kinds.append("clock step")
        else:
            self.not_run["clock step"] = "needs Linux and a C compiler"

    def peek(self) -> str:
        """The name of the next fault."""
        if not self._remaining:
            self._remaining = self._chance.sample(self.kinds, len(self.kinds))
        return self._remaining[-1]

    def next(self) -> Injected:
        """Begin the next fault: each kind in turn, in a new random order."""
        name = self.peek()
        self._remaining.pop()
        how, _, who = name.partition(" ")
        match how:
            case "kill":
                return self._kill(who)
            case "freeze":
                return self._freeze(who)
            case "hang" | "drop":
                proxy = self._site.proxies[who]
                proxy.set(Network(how))
                return Injected(name, self._chance.choice(_SECONDS), lambda: proxy.set(Network.UP))
            case "flush":
                with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self._site.valkey.url) as client:
                    client.flushall()
                return Injected(name)
            case "fail-over":
                try:
                    self._site.fail_over(who)
                except _NO_REPLICA as error:  # such as on a full disk, or while the server is down
                    return Injected(f"{name}: no replica ({type(error).__name__})")
                return Injected(name)
            case "disk":
                return Injected(name, self._chance.uniform(*_DISK_SECONDS), self._site.fill_disk())
            case _:
                step = self._chance.choice(_STEPS)
                self._site.step_clock(step)
                back = self._site.step_clock
                return Injected(name, self._chance.uniform(*_CLOCK_SECONDS), lambda: back(0))

    def _find(self, who: str) -> int:
        found = [pid for name, pid in self._site.pids().items() if name.partition(" ")[0] == who]
        return self._chance.choice(sorted(found)) if found else 0

    def _kill(self, who: str) -> Injected:
        pid = self._find(who)
        if not pid:
            return Injected(f"kill {who}: none runs")
        if who != "up":
            kill(pid)
            return Injected(f"kill {who}")
        with self._site.up_lock:
            kill(pid)
            if self._site.up is not None:
                self._site.up.wait()
            self._site.start_up()
        return Injected("kill up")

    def _freeze(self, who: str) -> Injected:
        """Stop a process by SIGSTOP, and continue it later if it was not killed for that."""
        pid = self._find(who)
        if not pid:
            return Injected(f"freeze {who}: none runs")
        born = pid_file.birth(pid)

        def tell(number: signal.Signals) -> None:
            if pid_file.birth(pid) != born:
                return
            if who in _ALONE:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            else:
                send_signal(pid, number)

        tell(signal.SIGSTOP)
        return Injected(f"freeze {who}", self._chance.choice(_SECONDS), lambda: tell(signal.SIGCONT))
