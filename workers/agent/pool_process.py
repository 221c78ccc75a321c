"""A pool's process as its agent knows it: its devices, its stop, and its end."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from app.fleet.hosts import AssignedPool
from app.fleet.pool import Desired
from app.kernel.processes.process import AdoptedProcess, Child


@dataclass(slots=True)
class PoolProcess:
    """A process of a pool on this host."""

    process: Child | AdoptedProcess
    epoch: int
    #: Bytes that were reserved for it on each device when it started, or was adopted.
    devices: dict[str, int]
    #: It computes on GPUs, and needs few cores.
    on_gpus: bool
    #: A server computes for it: it needs no cores.
    is_remote: bool
    #: Its share of the cores.
    threads: int
    #: When it started or was adopted, by the monotonic clock.
    started_at: float
    #: The kernel's count of out-of-memory kills at that time.
    oom_kills: int
    stop_requested: Desired | None = None
    stop_requested_at: float = 0.0
    #: Why it was asked to end, or killed.
    reason: str = ""
    killed: bool = False
    #: The highest measured use, in bytes, by device.
    peak: dict[str, int] = field(default_factory=dict)

    def ending(self, pool: AssignedPool) -> str:
        """Describe how the process ended."""
        code = self.process.returncode
        if self.reason:
            return self.reason
        if pool.detail:
            return pool.detail
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"it was ended by {name}" + (
                ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
            )
        return "it ended" if code is None else f"it ended with exit code {code}"
