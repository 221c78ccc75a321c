"""
The cluster: devices, the pools that hold bytes of them, and the configurations that can be started.

A pool is charged with its bytes from its grant until its process is known dead, in every state.
A pool that waits for the bytes of others is charged only with the bytes that they do not cover.
Ids are unique in a cluster, and each model has one configuration.

Values only. Instants are aware and come from the clock of the database; nothing here reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from app.devices.device import HardwareKind
from app.fleet.backoff import Backoff
from app.fleet.host import HostState
from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import PoolState
from app.footprint.layout import KnownLayout
from app.kernel.priority import Priority
from app.scheduler.planner.arrivals import ArrivalPattern

#: The type of a host's RAM, and that of simulated devices.
CPU, SIMULATED = "cpu", "simulated"
NO_TIME = timedelta(0)


@dataclass(frozen=True, slots=True)
class Device:
    """The memory of a GPU, of a host (RAM), or of a simulated device."""

    #: Stable over restarts, such as the UUID of a GPU.
    id: str
    #: For people, such as `gpu-0`.
    name: str
    host: str
    kind: HardwareKind
    #: Layouts are measured for a type, such as `NVIDIA L4` or `cpu`.
    type: str
    #: The limit of the sum of all reservations: the total less a margin.
    capacity_bytes: int
    #: Used by processes without a reservation.
    unmanaged_bytes: int = 0
    #: Factor for the tokens a second of layouts.
    speed: float = 1.0
    #: Of its host. A device that its agent does not report now is cordoned.
    state: HostState = HostState.SCHEDULABLE


class Packing(StrEnum):
    """Which of several fitting devices is used."""

    #: The fullest, so that large holes stay for large models.
    BINPACK = "binpack"
    #: The emptiest, and for replicas another device, then another host.
    SPREAD = "spread"


@dataclass(frozen=True, slots=True)
class Reserve:
    """Capacity guaranteed to a model before it is loaded. It is lent to others while it is idle."""

    #: Pools for which bytes are reserved.
    pools: int
    #: Time within which lent bytes are returned, by preemption if needed.
    within: timedelta = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Configuration:
    """A model with everything that changes what a pool loads."""

    #: The same for the same file and the same options.
    id: str
    #: Its name in the catalogue.
    model: str
    #: Steps that one pool executes at the same time.
    slots: int
    #: Preferred first.
    layouts: tuple[KnownLayout, ...]
    #: Hosts that have the file, or will have it after that time.
    files: Mapping[str, timedelta] = field(default_factory=dict)
    #: Time until a host that `files` does not name has the file; None: it is not placed there.
    fetch: timedelta | None = NO_TIME
    #: What a user does to have the file on a host, as a sentence.
    installation: str = ""
    #: By host, why the file there cannot be used.
    unusable: Mapping[str, str] = field(default_factory=dict)
    #: A pool that is idle for that time is stopped; None: it is not stopped for being idle.
    keep_alive: timedelta | None = timedelta(minutes=5)
    #: Pools that are kept running without demand, and the highest number of pools.
    min_pools: int = 0
    max_pools: int = 4
    #: Pools that an operator's open command asks for, without demand. Once started, they may be evicted.
    requested: int = 0
    reserve: Reserve | None = None
    #: The pools that are kept are never evicted or moved; further ones are.
    pinned: bool = False
    #: Ids of the only devices, or names of the only hosts, that it is placed on; empty: all.
    only: frozenset[str] = frozenset()
    #: Names of models with which it shares no device; its own name keeps replicas apart.
    anti_affinity: frozenset[str] = frozenset()
    packing: Packing = Packing.BINPACK

    @property
    def kept_pools(self) -> int:
        """Pools that are never stopped for being idle: those of the target, or one of a pinned model."""
        return max(self.min_pools, int(self.pinned))


@dataclass(frozen=True, slots=True)
class Pool:
    """An engine process, or the grant for one."""

    id: str
    #: Id of its configuration.
    configuration: str
    state: PoolState
    #: By id of the device, as the ledger has them.
    bytes: Mapping[str, int]
    slots: int
    #: When it was granted.
    started: datetime
    #: Steps that it executes now.
    busy: int = 0
    #: The most urgent class among them.
    serving: Priority | None = None
    #: Expected time until all of them have ended.
    work_left: timedelta = NO_TIME
    #: The highest number of preemptions among them.
    preemptions: int = 0
    #: When it began to serve.
    loaded: datetime | None = None
    #: When it last had work.
    last_used: datetime | None = None
    #: When a pool that is not loaded is expected to serve.
    expected: datetime | None = None
    #: When it was told to stop.
    stopping: datetime | None = None
    #: Its steps are being preempted.
    preempting: bool = False
    #: The ledger counts its bytes as non-preemptible.
    pinned: bool = False
    #: Rises with each grant.
    epoch: int = 0
    #: By id of a pool whose bytes it waits for, the bytes of each device that it gets when that pool is gone.
    backing: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    #: The namespace to whose quota it is charged.
    namespace: str = ""

    @property
    def used(self) -> datetime:
        """When it last had work, or else was loaded or granted."""
        return self.last_used or self.loaded or self.started


@dataclass(frozen=True, slots=True)
class Account:
    """The share of a namespace, its limits and what it has used."""

    #: Its weight in the fair share among namespaces with demand.
    weight: float = 1.0
    #: Device seconds of its steps, which decay by half each hour.
    attained_seconds: float = 0.0
    #: The limit of the bytes of pools charged to it; None: no limit.
    max_bytes: int | None = None
    #: The end of the period, when its allowance of device seconds is used up.
    exhausted_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """Everything that the planner decides on, except the demand."""

    devices: tuple[Device, ...]
    pools: tuple[Pool, ...] = ()
    configurations: tuple[Configuration, ...] = ()
    reserves: tuple[ReservedCapacity, ...] = ()
    #: By name of the model and by class, steps a second that asked for the model over the last minutes.
    rates: Mapping[str, Mapping[Priority, float]] = field(default_factory=dict)
    #: By namespace.
    accounts: Mapping[str, Account] = field(default_factory=dict)
    #: By name of the model, when it was requested before.
    arrivals: Mapping[str, ArrivalPattern] = field(default_factory=dict)
    backoffs: tuple[Backoff, ...] = ()


def promises(pools: Collection[Pool]) -> dict[str, dict[str, int]]:
    """By id of a pool and by device, the bytes that waiting pools get when it is gone."""
    promised: dict[str, dict[str, int]] = {}
    waiting = [pool for pool in pools if pool.backing]
    if not waiting:
        return promised
    ids = {pool.id for pool in pools}
    for pool in waiting:
        for victim, parts in pool.backing.items():
            if victim not in ids:
                continue
            sizes = promised.setdefault(victim, {})
            for device, size in parts.items():
                sizes[device] = sizes.get(device, 0) + size
    return promised


def charges(cluster: Cluster) -> dict[str, int]:
    """
    By id of a device, the bytes that are charged on it.

    Each pool is charged with its bytes, except for those that other pools still hold and have promised to it.
    """
    charged = {device.id: 0 for device in cluster.devices}
    for pool in cluster.pools:
        for device, size in pool.bytes.items():
            charged[device] = charged.get(device, 0) + size
    for promised in promises(cluster.pools).values():
        for device, size in promised.items():
            charged[device] -= size
    return charged
