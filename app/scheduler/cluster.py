"""
The fleet as the planner sees it: devices, the pools that hold bytes of them, and what each model needs.

A pool is charged with its bytes from the moment it is granted until its process is known dead, whatever its state.
A pool that waits for the bytes of others is charged only with what they do not cover.
No two values of one fleet have the same id.

Values only. Instants are aware and come from one clock, the database's; nothing here reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from app.fleet.backoff import Backoff
from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import PoolState
from app.kernel.priority import Priority

NOTHING = timedelta(0)


class DeviceKind(StrEnum):
    """What holds the bytes."""

    GPU = "gpu"
    #: The RAM of a host.
    CPU = "cpu"


class DeviceState(StrEnum):
    """What may be done with a device."""

    SCHEDULABLE = "schedulable"
    #: Nothing new is placed on it; what is there goes on.
    CORDONED = "cordoned"
    #: As cordoned, and what is there is stopped or moved.
    DRAINING = "draining"
    #: Its host was declared lost: it counts for nothing.
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Device:
    """Memory of one kind on one host: a GPU, or the host's RAM."""

    #: Unique in the fleet and stable over restarts, such as a GPU's UUID.
    id: str
    #: As people read it, such as `gpu-0`.
    name: str
    host: str
    kind: DeviceKind
    #: What layouts are measured for, such as `NVIDIA L4` or `cpu`.
    type: str
    #: What reservations may come to in all: the total less the head-room.
    capacity_bytes: int
    #: Used by processes that hold no reservation.
    unmanaged_bytes: int = 0
    #: Tokens a second, as a multiple of what layouts say.
    speed: float = 1.0
    state: DeviceState = DeviceState.SCHEDULABLE
    #: Declared in settings, with no hardware behind it.
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to lay a configuration on devices of a type: on one, or split over several of one host."""

    #: Type of all devices of the set.
    type: str
    #: Bytes on each device of the set. One for a pool on one device.
    parts: tuple[int, ...]
    #: From the start of the process until it serves, with the file on the host.
    load: timedelta
    #: Of one slot.
    tokens_per_second: float = 1.0
    #: Bytes of the host's RAM beside GPUs: the process itself, layers that stay there, states of parked texts.
    ram: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices together, without the RAM beside them."""
        return sum(self.parts)

    def on(self, devices: Sequence[str]) -> dict[str, int]:
        """Bytes by device, of a set that ends with the host's RAM where the layout needs it and the fleet has it."""
        return dict(zip(devices, (*self.parts, self.ram), strict=False))


class Packing(StrEnum):
    """Which of several fitting devices is taken."""

    #: The fullest, so that large holes stay for large models.
    BINPACK = "binpack"
    #: The emptiest, and for replicas another device, then another host.
    SPREAD = "spread"


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes that a model owns before it is loaded. While they are idle they are lent to others."""

    #: Pools for which bytes are set aside.
    pools: int
    #: Time within which lent bytes come back, by preemption if needed.
    within: timedelta = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Configuration:
    """A model with the options that it is loaded with: what one pool serves."""

    #: The same for the same file and the same options.
    id: str
    #: Its name in the catalogue.
    model: str
    #: Steps that one pool works on at the same time.
    slots: int
    #: Preferred first.
    layouts: tuple[Layout, ...]
    #: Hosts that have the file, or will have it after that long.
    files: Mapping[str, timedelta] = field(default_factory=dict)
    #: Time until a host that `files` does not name has the file; None: it is not placed there.
    fetch: timedelta | None = NOTHING
    #: A pool without work for that long is stopped; None: never for that alone.
    keep_alive: timedelta | None = timedelta(minutes=5)
    #: Pools that are kept up whatever the demand, and the most that there may be.
    min_pools: int = 0
    max_pools: int = 4
    #: Pools that an operator wants now, without work for them. Once they are there, others may take their place.
    ordered: int = 0
    reserve: Reserve | None = None
    #: Its pools are never stopped to make room.
    pinned: bool = False
    #: Ids of the only devices, or names of the only hosts, that it is placed on; empty: all.
    only: frozenset[str] = frozenset()
    #: Names of models beside which it is not placed on a device; its own name keeps replicas apart.
    anti_affinity: frozenset[str] = frozenset()
    packing: Packing = Packing.BINPACK


@dataclass(frozen=True, slots=True)
class Pool:
    """An engine process, or the grant for one."""

    id: str
    #: Id of its configuration.
    configuration: str
    state: PoolState
    #: By id of the device; what the ledger charges.
    bytes: Mapping[str, int]
    slots: int
    #: When it was granted.
    started: datetime
    #: Steps that it works on now.
    busy: int = 0
    #: The most urgent class among them.
    serving: Priority | None = None
    #: Expected time until all of them have ended.
    work_left: timedelta = NOTHING
    #: The most often that any of them was preempted before.
    preemptions: int = 0
    #: When it began to serve.
    loaded: datetime | None = None
    #: When it last had work.
    last_used: datetime | None = None
    #: When a pool that is not loaded is expected to serve.
    expected: datetime | None = None
    #: When it was asked to end.
    stopping: datetime | None = None
    #: Its steps are being handed back.
    handing_back: bool = False
    pinned: bool = False
    #: Rises with each grant.
    epoch: int = 0
    #: By id of a pool whose bytes it waits for, what it gets of each device when that is gone; as the ledger has it.
    backing: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    #: On whose behalf it was granted.
    namespace: str = ""

    @property
    def used(self) -> datetime:
        """When it last did something for somebody."""
        return self.last_used or self.loaded or self.started


@dataclass(frozen=True, slots=True)
class RequestRate:
    """How often a configuration is asked for."""

    #: Steps a second, averaged over the last minutes.
    rate: float = 0.0
    #: Parts of them by class, 1 in all; empty: not known, taken for standard.
    classes: Mapping[Priority, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Account:
    """What a namespace may use, and what it has used."""

    #: Its share beside other namespaces that want something.
    weight: float = 1.0
    #: Seconds of devices that its steps had, faded over the last hour or so.
    attained_seconds: float = 0.0
    #: The most bytes that pools granted on its behalf may hold; None: no limit.
    max_bytes: int | None = None
    #: Set when its allowance of device seconds is used up; says until when.
    exhausted_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """All that the planner decides on, besides the demand."""

    devices: tuple[Device, ...]
    pools: tuple[Pool, ...] = ()
    configurations: tuple[Configuration, ...] = ()
    reserves: tuple[ReservedCapacity, ...] = ()
    #: By id of a configuration.
    usage: Mapping[str, RequestRate] = field(default_factory=dict)
    #: By namespace.
    accounts: Mapping[str, Account] = field(default_factory=dict)
    backoffs: tuple[Backoff, ...] = ()


@dataclass(frozen=True, slots=True)
class Demand:
    """Steps of one configuration, class and namespace that wait, or will."""

    configuration: str
    priority: Priority
    #: How many, and since when the oldest waits.
    steps: int
    oldest: datetime
    #: Mean of the instants since which they wait; None: as the oldest.
    mean: datetime | None = None
    namespace: str = ""
    #: When the most urgent of them must have begun.
    deadline: datetime | None = None
    #: Expected time that one of them keeps a slot.
    work: timedelta = timedelta(seconds=5)
    #: Set for steps that cannot begin yet, because steps that they need still run: when they are expected to be ready.
    ready: datetime | None = None


def promises(pools: Iterable[Pool]) -> dict[str, dict[str, int]]:
    """Bytes of each pool, by its id and by device, that waiting pools will get when it is gone."""
    held = {pool.id: pool for pool in pools}
    promised: dict[str, dict[str, int]] = {}
    for pool in held.values():
        for victim, parts in pool.backing.items():
            if victim not in held:
                continue
            of = promised.setdefault(victim, {})
            for device, size in parts.items():
                of[device] = of.get(device, 0) + size
    return promised


def charges(fleet: Cluster) -> dict[str, int]:
    """
    Bytes that are charged on each device, by its id.

    Every pool is charged with its bytes, but for those of a waiting pool that are promised to it by pools still there.
    """
    charged = {device.id: 0 for device in fleet.devices}
    for pool in fleet.pools:
        for device, size in pool.bytes.items():
            charged[device] = charged.get(device, 0) + size
    for promised in promises(fleet.pools).values():
        for device, size in promised.items():
            charged[device] -= size
    return charged
