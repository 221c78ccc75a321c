"""
The plan state: the cluster as the plan leaves it, while the plan is made.

It is the only state on which decisions are based. It holds the free bytes of each device, the pools that are there or
planned, the pools that the plan stops, idle reserves, the bytes of each namespace, and device sets kept for overdue
demand. One call starts or stops a pool in all of it. Only `placement` and `defragmentation` change it; searches,
reasons and explanations read it.

The bytes of a stopped pool count for the pools to which they are promised, and for no other.
Idle bytes of a reserve count for its owner; for others only where reserves are lent.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime

from app.devices.device import HardwareKind
from app.fleet.host import HostState
from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import COMING, PoolState
from app.footprint.layout import KnownLayout
from app.scheduler.planner.cluster import (
    Cluster,
    Configuration,
    Device,
    Pool,
    charges,
    promises,
)
from app.scheduler.planner.policy import PlacementPolicy

#: Ids of devices of one host: those that a pool computes on, then the host's RAM where the layout needs some.
DeviceSet = tuple[str, ...]


class PlanState:
    """Free bytes, pools, reserves and quotas, as the plan leaves them."""

    def __init__(self, cluster: Cluster, policy: PlacementPolicy) -> None:
        """The state before the plan: the cluster as it is."""
        self._lend = policy.lend
        self.devices = {device.id: device for device in cluster.devices}
        charged = charges(cluster)
        #: By device, the bytes that it would have free without pools.
        self.usable = {d.id: d.capacity_bytes - d.unmanaged_bytes for d in cluster.devices}
        #: By device. Negative when unmanaged memory covers bytes that were granted.
        self.free = {id_: size - charged[id_] for id_, size in self.usable.items()}
        #: By device, the pools that hold bytes of it.
        self.pools_on: dict[str, list[Pool]] = {device.id: [] for device in cluster.devices}
        #: Ids of the pools that the plan stops.
        self.stopped: set[str] = set()
        self._pools_of: dict[str, list[Pool]] = {}
        #: By configuration, how many of those the plan stops.
        self._stopped_of: dict[str, int] = {}
        self._planned = 0
        #: By host, the id of its RAM.
        self._ram = {d.host: d.id for d in cluster.devices if d.kind is HardwareKind.CPU}
        #: By device, the pools that compute on it, or will soon. A pool on n devices counts 1/n on each.
        self.active = dict.fromkeys(self.devices, 0.0)
        #: By host, the pools that load there, or will. Hosts without such a pool are not in it.
        self.loads = Counter[str]()
        self._hosts = len({device.host for device in cluster.devices})
        self._promised = promises(cluster.pools)
        #: Rises with each change of pools and reserves.
        self.revision = 0
        #: By device. Rises when its pools change, their bytes are promised, or the regret for one of them changes.
        self.revisions = dict.fromkeys(self.devices, 0)
        for pool in cluster.pools:
            self._see(pool)
        #: Ids of the pools that are kept: of each model as many as its configuration says.
        self.kept = self._find_kept(cluster)
        #: By type, the devices on which pools may be started.
        self.schedulable: dict[str, list[Device]] = {}
        for one in cluster.devices:
            if one.state is HostState.SCHEDULABLE:
                self.schedulable.setdefault(one.type, []).append(one)
        #: By type, free bytes and ids of the schedulable devices, the fullest first.
        self.by_free = {
            type_: sorted((self.free[d.id], d.id) for d in some) for type_, some in self.schedulable.items()
        }
        #: By type and host, the schedulable devices, those with most free first: negated free bytes, and ids.
        self.emptiest: dict[str, dict[str, list[tuple[int, str]]]] = {}
        for type_, some in self.schedulable.items():
            hosts = self.emptiest[type_] = {}
            for one in some:
                hosts.setdefault(one.host, []).append((-self.free[one.id], one.id))
            for ranked in hosts.values():
                ranked.sort()
        #: By type, the usable bytes of the smallest schedulable device.
        self.smallest = {type_: min(self.usable[d.id] for d in some) for type_, some in self.schedulable.items()}
        #: By configuration and device, bytes of reserves, used or not.
        self._owned: Counter[tuple[str, str]] = Counter()
        for reserve in cluster.reserves:
            for device, size in reserve.bytes.items():
                self._owned[reserve.configuration, device] += size
        #: By device and owner, bytes of reserves that the owner does not use.
        self._idle_reserves: dict[str, dict[str, int]] = {}
        for owner, device in self._owned:
            self._idle_reserves.setdefault(device, {})[owner] = self._unused(owner, device)
        #: By device, bytes of reserves and of pools that are kept or may still be alive.
        self.non_preemptible = self._count_non_preemptible(cluster)
        #: By device, the configuration with overdue demand for which it is kept, and the seconds until it is free. Only
        #: pools whose steps end before that are started there (backfill).
        self.nominated: dict[str, tuple[str, float]] = {}
        self._max_bytes = {n: one.max_bytes for n, one in cluster.accounts.items() if one.max_bytes is not None}
        #: By namespace with a limit, the bytes that its pools hold.
        self.held_bytes = dict.fromkeys(self._max_bytes, 0)
        for pool in cluster.pools if self.held_bytes else ():
            self._charge(pool.namespace, pool.bytes)

    def _unused(self, owner: str, device: str) -> int:
        used = sum(pool.bytes[device] for pool in self.pools_on.get(device, ()) if pool.configuration == owner)
        return max(self._owned[owner, device] - used, 0)

    def _find_kept(self, cluster: Cluster) -> frozenset[str]:
        """The pools that the ledger has as pinned first, then the oldest. Those on drained devices have to leave."""
        draining = {device.id for device in cluster.devices if device.state is HostState.DRAINING}
        found: set[str] = set()
        for configuration in cluster.configurations:
            if configuration.kept_pools:
                pools = [p for p in self.pools_of(configuration.id) if not draining & p.bytes.keys()]
                pools.sort(key=lambda pool: (not pool.pinned, pool.started, pool.id))
                found |= {pool.id for pool in pools[: configuration.kept_pools]}
        return frozenset(found)

    def _count_non_preemptible(self, cluster: Cluster) -> dict[str, int]:
        found = dict.fromkeys(self.devices, 0)
        held = [one.bytes for one in cluster.reserves]
        held += [
            one.bytes for one in cluster.pools if one.pinned or one.state is PoolState.SUSPECT or one.id in self.kept
        ]
        for bytes_ in held:
            for device, size in bytes_.items():
                found[device] = found.get(device, 0) + size
        return found

    def _see(self, pool: Pool) -> None:
        """Count a pool of the cluster. There may be tens of thousands."""
        state, bytes_ = pool.state, pool.bytes
        for device in bytes_:
            if (pools := self.pools_on.get(device)) is not None:
                pools.append(pool)
        if state in COMING:
            self._add(pool)
        loads = state is PoolState.STARTING or state is PoolState.WAITING
        if not (pool.busy or loads):
            return
        computing = self.computing(bytes_)
        if loads and computing and computing[0] in self.devices:
            self.loads[self.devices[computing[0]].host] += 1
        for device in computing:
            if device in self.active:
                self.active[device] += 1 / len(computing)

    def _add(self, pool: Pool) -> None:
        if (pools := self._pools_of.get(pool.configuration)) is None:
            self._pools_of[pool.configuration] = [pool]
        else:
            pools.append(pool)

    def _charge(self, namespace: str, bytes_: Mapping[str, int]) -> None:
        if namespace in self.held_bytes:
            self.held_bytes[namespace] += sum(bytes_.values())

    # ---- changes ----

    def add_reserve(self, owner: str, bytes_: Mapping[str, int]) -> None:
        """Reserve bytes for a configuration."""
        self.revision += 1
        for device, size in bytes_.items():
            self.non_preemptible[device] += size
            self._owned[owner, device] += size
            self._idle_reserves.setdefault(device, {})[owner] = self._unused(owner, device)

    def drop_reserve(self, reserve: ReservedCapacity) -> None:
        """Return the bytes of a reserve."""
        self.add_reserve(reserve.configuration, {device: -size for device, size in reserve.bytes.items()})

    def start(
        self,
        configuration: Configuration,
        bytes_: Mapping[str, int],
        victims: Iterable[Pool],
        expected: datetime,
        namespace: str = "",
    ) -> None:
        """
        Add a pool. Its bytes are charged to its devices and to the namespace.

        Bytes of victims are promised to it in the order in which the ledger promises them.
        """
        victims = sorted(victims, key=lambda pool: pool.id)
        planned = Pool(
            id=f"planned {self._planned}",
            configuration=configuration.id,
            state=PoolState.WAITING,
            bytes=bytes_,
            slots=configuration.slots,
            started=expected,
            expected=expected,
            namespace=namespace,
        )
        self._planned += 1
        kept = self.keeps_next(configuration)
        self._charge(namespace, bytes_)
        computing = self.computing(bytes_)
        self.loads[self.devices[computing[0]].host] += 1
        for device in computing:
            self.active[device] += 1 / len(computing)
        self._add(planned)
        self._revise(configuration.id, bytes_)
        for device, size in bytes_.items():
            need = size
            if kept:
                self.non_preemptible[device] += size
            for victim in victims:
                if part := min(need, self.unpromised(victim, device)):
                    need -= part
                    promised = self._promised.setdefault(victim.id, {})
                    promised[device] = promised.get(device, 0) + part
            self.pools_on[device].append(planned)
            if own := self.own_reserve(device, configuration.id):
                self._idle_reserves[device][configuration.id] = max(own - size, 0)
            known, free = self.devices[device], self.free[device]
            if known.state is HostState.SCHEDULABLE:
                for ranks, sign in ((self.by_free[known.type], 1), (self.emptiest[known.type][known.host], -1)):
                    del ranks[bisect_left(ranks, (sign * free, device))]
                    insort(ranks, (sign * (free - need), device))
            self.free[device] -= need

    def stop(self, pool: Pool) -> None:
        """Stop a pool. Its bytes stay charged until its process is gone."""
        if pool.id not in self.stopped and pool.state in COMING:
            self._stopped_of[pool.configuration] = self._stopped_of.get(pool.configuration, 0) + 1
        self.stopped.add(pool.id)
        self._revise(pool.configuration, pool.bytes)

    def _revise(self, configuration: str, devices: Iterable[str]) -> None:
        """
        Count a change of the devices, after a pool of the configuration was started or stopped there.

        The regret for its other pools changes when there is a second pool, and when there is only one again.
        """
        self.revision += 1
        changed = set(devices)
        if self.count_coming(configuration) <= 2:
            changed.update(device for pool in self.coming(configuration) for device in pool.bytes)
        for device in changed:
            if device in self.revisions:
                self.revisions[device] += 1

    def nominate(self, devices: DeviceSet, configuration: str, seconds: float) -> None:
        """Keep devices, which will be free in so many seconds, for a configuration; unless they are kept already."""
        for device in devices:
            self.nominated.setdefault(device, (configuration, seconds))

    # ---- pools ----

    def pools_of(self, configuration: str) -> list[Pool]:
        """Pools that serve it, or will: those that the plan starts too, and those that it stops."""
        return self._pools_of.get(configuration, [])

    def coming(self, configuration: str) -> list[Pool]:
        """Pools that serve it, or will, once the plan is carried out."""
        return [pool for pool in self.pools_of(configuration) if pool.id not in self.stopped]

    def count_coming(self, configuration: str) -> int:
        """How many pools serve it, or will, once the plan is carried out."""
        return len(self._pools_of.get(configuration, ())) - self._stopped_of.get(configuration, 0)

    def keeps_next(self, configuration: Configuration) -> bool:
        """Whether the next pool of the configuration is one of those that are kept."""
        return self.count_coming(configuration.id) < configuration.kept_pools

    def unpromised(self, pool: Pool, device: str) -> int:
        """Bytes of a pool on a device that are promised to no other pool."""
        promised = self._promised.get(pool.id)
        return pool.bytes.get(device, 0) - (promised.get(device, 0) if promised else 0)

    def may_hold(self, namespace: str, more: int) -> bool:
        """Whether the pools of a namespace may hold so many bytes more."""
        limit = self._max_bytes.get(namespace)
        return limit is None or self.held_bytes[namespace] + more <= limit

    # ---- reserves ----

    @property
    def has_idle_reserves(self) -> bool:
        """Whether bytes of any device are reserved, or were; all of them may be in use."""
        return bool(self._idle_reserves)

    def own_reserve(self, device: str, configuration: str) -> int:
        """Idle bytes of the device that are reserved for it."""
        owners = self._idle_reserves.get(device)
        return owners.get(configuration, 0) if owners else 0

    def others_reserves(self, device: str, configuration: str) -> int:
        """Idle bytes of the device that are reserved for others."""
        owners = self._idle_reserves.get(device)
        return sum(owners.values()) - owners.get(configuration, 0) if owners else 0

    def borrows(self, configuration: str, devices: DeviceSet) -> bool:
        """Whether idle bytes of any of the devices are reserved for others."""
        if not self._idle_reserves:
            return False
        return any(self.others_reserves(device, configuration) > 0 for device in devices)

    def reserve_owners(self, device: str) -> list[str]:
        """Configurations with idle reserved bytes on the device."""
        return [owner for owner, size in self._idle_reserves.get(device, {}).items() if size]

    def is_within_reserve(self, pool: Pool) -> bool:
        """Whether its configuration holds no more of the pool's devices than is reserved for it there."""
        return all(
            sum(p.bytes[device] for p in self.pools_on[device] if p.configuration == pool.configuration)
            <= self._owned.get((pool.configuration, device), 0)
            for device in pool.bytes
            if device in self.pools_on
        )

    def has_reserve(self, pool: Pool) -> bool:
        """Whether bytes of its devices are reserved for its configuration."""
        return any(pool.configuration in self._idle_reserves.get(device, ()) for device in pool.bytes)

    def reclaims(self, configuration: Configuration, layout: KnownLayout, devices: DeviceSet) -> bool:
        """Whether all bytes that the layout needs there are reserved for the configuration."""
        return all(self.own_reserve(d, configuration.id) >= part for d, part in layout.on(devices).items())

    # ---- bytes ----

    def free_for(self, configuration: Configuration, device: str) -> int:
        """Bytes that a pool of the configuration may use now."""
        free = self.free[device]
        return free if self._lend else free - self.others_reserves(device, configuration.id)

    def missing(self, configuration: Configuration, layout: KnownLayout, devices: DeviceSet) -> dict[str, int]:
        """By device, the bytes of the layout that are not free; 0 or less where they are."""
        parts = layout.on(devices).items()
        return {device: part - self.free_for(configuration, device) for device, part in parts}

    # ---- devices ----

    @property
    def fewest_loads(self) -> int:
        """The pools that load on the host where the fewest do; 0 without hosts."""
        return min(self.loads.values(), default=0) if len(self.loads) == self._hosts else 0

    def computing(self, devices: Iterable[str]) -> list[str]:
        """The devices of a pool that it computes on: the GPUs where it has some, else the RAM."""
        known = list(devices)
        if len(known) == 1:
            return known
        gpus = [id_ for id_ in known if id_ in self.devices and self.devices[id_].kind is not HardwareKind.CPU]
        return gpus or known

    def ram_for(self, layout: KnownLayout, device: str) -> str | None:
        """The RAM of the device's host where the layout needs some in addition to the device; None elsewhere."""
        known = self.devices.get(device)
        return self._ram.get(known.host) if known is not None and layout.ram else None

    def with_ram(self, layout: KnownLayout, devices: DeviceSet) -> DeviceSet:
        """The set, with the RAM of its host where the layout needs some."""
        ram = self.ram_for(layout, devices[0])
        return devices if ram is None else (*devices, ram)

    def fits_reserve(self, reserve: ReservedCapacity, layout: KnownLayout) -> bool:
        """Whether a pool with that layout fits into the reserve."""
        computing = tuple(self.computing(reserve.bytes))
        sizes = sorted((reserve.bytes[device] for device in computing), reverse=True)
        ram = self.with_ram(layout, computing)[len(computing) :]
        return (
            len(sizes) == len(layout.parts)
            and all(part <= size for part, size in zip(sorted(layout.parts, reverse=True), sizes, strict=True))
            and all(layout.ram <= reserve.bytes.get(device, 0) for device in ram)
        )
