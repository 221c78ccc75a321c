"""Values of a simulated fleet: workloads, live pools, outcomes, and the statistics that the planner gets."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from app.fleet.pool import PoolState
from app.kernel.priority import Priority
from app.scheduler.planner.arrivals import ArrivalPattern
from app.scheduler.planner.cluster import Account, Cluster, Configuration, Device
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.plan import Plan

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
#: Tokens of a prompt that take as long as one token of an answer.
PREFILL = 40.0
#: Seconds over which arrivals are averaged, and over which attained service fades.
RATE_WINDOW, SHARE_WINDOW = 180.0, 900.0
#: Seconds that a request is expected to take before any of its model has ended.
FIRST_GUESS = 5.0


def instant(seconds: float) -> datetime:
    return EPOCH + timedelta(seconds=seconds)


@dataclass(slots=True)
class Request:
    """One step, and those that follow it."""

    configuration: str
    priority: Priority
    namespace: str
    #: Seconds since the start.
    ready: float
    prompt: int
    answer: int
    #: Configuration, prompt and answer of the steps after it.
    then: tuple[tuple[str, int, int], ...] = ()
    #: When the attempt that succeeded began, and when it ended.
    started: float = math.nan
    finished: float = math.nan
    preempted: int = 0

    @property
    def tokens(self) -> float:
        """In tokens of an answer."""
        return self.answer + self.prompt / PREFILL


@dataclass(frozen=True, slots=True)
class Failure:
    """A device that fails and returns, empty."""

    at: float
    device: str
    lasts: float


@dataclass(frozen=True, slots=True)
class Workload:
    """The devices and models of a fleet, and the requests that arrive."""

    devices: tuple[Device, ...]
    configurations: tuple[Configuration, ...]
    requests: tuple[Request, ...]
    #: Seconds during which they arrive.
    length: float
    failures: tuple[Failure, ...] = ()
    #: Real bytes as a multiple of what the configuration says, by its id.
    truth: Mapping[str, float] = field(default_factory=dict)
    #: By id of a configuration, what is known of its arrivals before the start.
    arrivals: Mapping[str, ArrivalPattern] = field(default_factory=dict)


class Planner(Protocol):
    """Decides which pools are started and stopped."""

    name: str
    #: Whether requests of a model are begun by class, or in the order of their arrival.
    by_class: bool
    #: Seconds that a pool which is stopped may go on with its work.
    drain: float

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], now: datetime) -> Plan: ...


@dataclass(slots=True)
class Live:
    """A pool of the simulation."""

    id: str
    configuration: Configuration
    bytes: dict[str, int]
    state: PoolState
    granted: float
    namespace: str
    #: Seconds of its start, and tokens a second of one slot.
    load: float
    speed: float
    expected: float
    loaded: float | None = None
    used: float | None = None
    stopping: float | None = None
    #: Requests, with the time by the pool's own clock at which each ends.
    work: list[tuple[float, int, Request]] = field(default_factory=list)
    #: Seconds of work at full speed so far, up to when, and how fast it goes now.
    clock: float = 0.0
    seen: float = 0.0
    rate: float = 1.0
    #: Rises when what was scheduled for it no longer holds.
    version: int = 0
    served: int = 0

    @property
    def has_process(self) -> bool:
        return self.state is not PoolState.WAITING


@dataclass(slots=True)
class Disk:
    """The disk of a host. Those that load at the same time share it evenly."""

    #: Those that read now, with the seconds that each would still read if it was alone.
    readers: dict[str, float] = field(default_factory=dict)
    #: Up to when that holds.
    seen: float = 0.0
    #: Rises with each change.
    version: int = 0

    def advance(self, now: float) -> list[str]:
        """Bring it up to now. Ids of those that have read everything, which leave."""
        part = (now - self.seen) / max(len(self.readers), 1)
        self.seen = now
        self.version += 1
        left = {id_: seconds - part for id_, seconds in self.readers.items()}
        self.readers = {id_: seconds for id_, seconds in left.items() if seconds > 1e-6}
        return [id_ for id_ in left if id_ not in self.readers]

    @property
    def next_end(self) -> float:
        """Seconds until the next has read everything."""
        return min(self.readers.values()) * len(self.readers)


@dataclass(slots=True)
class Outcome:
    """The outcome of a run."""

    requests: list[Request] = field(default_factory=list)
    loads: int = 0
    loading_seconds: float = 0.0
    #: Loads within a minute after the model was stopped, and loads that served nothing.
    reloads: int = 0
    unused_loads: int = 0
    preempted: int = 0
    moves: int = 0
    #: Devices whose live pools have more bytes than there are, and broken promises of the ledger.
    overcommitments: int = 0
    #: Grants that were planned and refused by the ledger; loads that ended because the footprint was wrong.
    refused_grants: int = 0
    failed_loads: int = 0
    plans: int = 0
    plan_seconds: float = 0.0
    slowest_plan: float = 0.0
    end: float = 0.0
    #: Byte-seconds of: all devices, live pools, pools with work.
    capacity: float = 0.0
    charged: float = 0.0
    useful: float = 0.0


class Statistics:
    """The statistics of a control worker: request rates, times of requests, and attained service."""

    def __init__(self, arrivals: Mapping[str, ArrivalPattern]) -> None:
        #: By configuration.
        self.arrivals = dict(arrivals)
        #: Decayed counts, with the time up to which they hold.
        self._rates: dict[tuple[str, Priority], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self._attained: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        #: Mean seconds of a request, by configuration, and of how many.
        self._means: dict[str, tuple[float, int]] = {}

    def arrived(self, request: Request, now: float) -> None:
        key = request.configuration, request.priority
        at, before = instant(now), self.arrivals.get(request.configuration)
        self.arrivals[request.configuration] = (
            before.after(at, request.priority) if before else ArrivalPattern(at, request.priority)
        )
        count, seen = self._rates[key]
        self._rates[key] = (count * math.exp((seen - now) / RATE_WINDOW) + 1, now)

    def worked(self, pool: Live, span: float, now: float) -> None:
        for namespace, count in Counter(request.namespace for _, _, request in pool.work).items():
            had, seen = self._attained[namespace]
            part = span * len(pool.bytes) * count / len(pool.work)
            self._attained[namespace] = (had * math.exp((seen - now) / SHARE_WINDOW) + part, now)

    def ended(self, request: Request, now: float) -> None:
        mean, count = self._means.get(request.configuration, (0.0, 0))
        count = min(count + 1, 50)
        self._means[request.configuration] = (mean + (now - request.started - mean) / count, count)

    def mean(self, configuration: str) -> float:
        return self._means.get(configuration, (FIRST_GUESS, 0))[0]

    def accounts(self, now: float) -> dict[str, Account]:
        return {
            name: Account(attained_seconds=had * math.exp((seen - now) / SHARE_WINDOW))
            for name, (had, seen) in self._attained.items()
        }

    def rates(self, now: float) -> dict[str, dict[Priority, float]]:
        """By model and class, requests a second."""
        rates: dict[str, dict[Priority, float]] = defaultdict(dict)
        for (configuration, priority), (count, seen) in self._rates.items():
            rates[configuration][priority] = count / RATE_WINDOW * math.exp((seen - now) / RATE_WINDOW)
        return {model: some for model, some in rates.items() if sum(some.values()) > 0}
