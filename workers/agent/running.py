"""A pool's process as its agent knows it: what it may touch, what it was asked for, and how it ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from app.fleet.hosts import AssignedPool
from app.fleet.pool import Desired
from app.kernel.processes.process import AdoptedProcess, Child


@dataclass(slots=True)
class Running:
    """A process of a pool on this host."""

    process: Child | AdoptedProcess
    epoch: int
    #: What it had reserved of each device when it began, or was adopted.
    devices: dict[str, int]
    #: It computes on GPUs, and needs few cores.
    on_gpus: bool
    #: Its part of the cores.
    threads: int
    began: float
    #: How often the kernel had killed for want of memory by then.
    kills: int
    asked: Desired | None = None
    asked_at: float = 0.0
    #: Why it was asked to end, or killed.
    reason: str = ""
    killed: bool = False
    #: By device, the most that it was measured to use.
    peak: dict[str, int] = field(default_factory=dict)

    def ending(self, pool: AssignedPool) -> str:
        """How it ended, in words."""
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
