"""
Room: what is free on each device while a plan is made, and who holds the rest.

The bytes of a pool that is stopped count for those that they are promised to, and for nobody else.
Idle bytes of a reserve count for its owner; for others only where reserves are lent, and never for pools that stay.

Made anew for each plan, and kept up to date with what the plan does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from itertools import combinations, islice

from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import COMING, PoolState
from app.scheduler.cluster import (
    Cluster,
    Configuration,
    Device,
    DeviceKind,
    DeviceState,
    Layout,
    Packing,
    Pool,
    charges,
    promises,
)
from app.scheduler.policy import PlacementPolicy

DeviceSet = tuple[str, ...]


class Room:
    """Free bytes by device, pools by device and configuration, idle reserves."""

    def __init__(self, fleet: Cluster, policy: PlacementPolicy) -> None:
        self._policy = policy
        self.devices = {device.id: device for device in fleet.devices}
        charged = charges(fleet)
        self.free = {d.id: d.capacity_bytes - d.unmanaged_bytes - charged[d.id] for d in fleet.devices}
        self.on: dict[str, list[Pool]] = {device.id: [] for device in fleet.devices}
        self._coming: dict[str, list[Pool]] = {}
        self._planned: list[Pool] = []
        #: By host.
        self._ram = {d.host: d.id for d in fleet.devices if d.kind is DeviceKind.CPU and not d.simulated}
        #: Pools on a device that work, or will soon. A split one works on each of its devices for a part of the time.
        self.active = dict.fromkeys(self.devices, 0.0)
        self._promised = promises(fleet.pools)
        self._apart = _kept_apart(fleet)
        for pool in fleet.pools:
            if pool.state in COMING:
                self._coming.setdefault(pool.configuration, []).append(pool)
            active = pool.busy > 0 or pool.state is PoolState.STARTING or pool.state is PoolState.WAITING
            computes = self.computing(pool.bytes)
            for device in pool.bytes:
                if device in self.on:
                    self.on[device].append(pool)
            for device in computes:
                if device in self.active:
                    self.active[device] += active / len(computes)
        self.open: dict[str, list[Device]] = {}
        for one in fleet.devices:
            if one.state is DeviceState.SCHEDULABLE:
                self.open.setdefault(one.type, []).append(one)
        #: Ids of open devices of a type with their free bytes, the fullest first.
        self._by_free = {kind: sorted((self.free[d.id], d.id) for d in some) for kind, some in self.open.items()}
        #: By configuration and device, used or not.
        self._owned: Counter[tuple[str, str]] = Counter()
        for reserve in fleet.reserves:
            for device, size in reserve.bytes.items():
                self._owned[reserve.configuration, device] += size
        self._reserved = self._idle_reserves()
        #: Bytes that are set aside, or held by pools that stay. They never come to more than there is.
        self.non_preemptible = self._non_preemptible(fleet)
        #: Devices that are kept for one configuration, and the seconds until it will use them.
        self.held: dict[str, tuple[str, float]] = {}

    def _idle_reserves(self) -> dict[str, dict[str, int]]:
        """Bytes that are set aside and not used by their owner: by device, by owner."""
        found: dict[str, dict[str, int]] = {}
        for owner, device in self._owned:
            found.setdefault(device, {})[owner] = self._idle(owner, device)
        return found

    def _idle(self, owner: str, device: str) -> int:
        used = sum(pool.bytes[device] for pool in self.on.get(device, ()) if pool.configuration == owner)
        return max(self._owned[owner, device] - used, 0)

    def _non_preemptible(self, fleet: Cluster) -> dict[str, int]:
        non_preemptible = dict.fromkeys(self.devices, 0)
        staying = {one.id for one in fleet.configurations if one.pinned or one.min_pools}
        held = [one.bytes for one in fleet.reserves]
        held += [
            one.bytes
            for one in fleet.pools
            if one.pinned or one.state is PoolState.SUSPECT or one.configuration in staying
        ]
        for bytes_ in held:
            for device, size in bytes_.items():
                non_preemptible[device] = non_preemptible.get(device, 0) + size
        return non_preemptible

    def add_reserve(self, owner: str, bytes_: Mapping[str, int]) -> None:
        """Let a configuration own bytes from now on."""
        for device, size in bytes_.items():
            self.non_preemptible[device] += size
            self._owned[owner, device] += size
            self._reserved.setdefault(device, {})[owner] = self._idle(owner, device)

    def give_back(self, reserve: ReservedCapacity) -> None:
        """Let its owner own it no longer."""
        self.add_reserve(reserve.configuration, {device: -size for device, size in reserve.bytes.items()})

    def coming(self, configuration: str) -> list[Pool]:
        """Pools that serve it, or will; those that this plan starts too."""
        return self._coming.get(configuration, [])

    def own(self, device: str, configuration: str) -> int:
        """Idle bytes of the device that are set aside for it."""
        owners = self._reserved.get(device)
        return owners.get(configuration, 0) if owners else 0

    def lent(self, device: str, configuration: str) -> int:
        """Idle bytes of the device that are set aside for others."""
        owners = self._reserved.get(device)
        return sum(size for owner, size in owners.items() if owner != configuration) if owners else 0

    def lenders(self, device: str) -> list[str]:
        """Configurations with idle bytes of the device that are set aside for them."""
        return [owner for owner, size in self._reserved.get(device, {}).items() if size]

    def is_within_reserve(self, pool: Pool) -> bool:
        """Whether its configuration has no more of its devices than is set aside for it there."""
        return all(
            sum(p.bytes[device] for p in self.on[device] if p.configuration == pool.configuration)
            <= self._owned.get((pool.configuration, device), 0)
            for device in pool.bytes
            if device in self.on
        )

    def owns(self, pool: Pool) -> bool:
        """Whether bytes of its devices are set aside for its configuration."""
        return any(pool.configuration in self._reserved.get(device, ()) for device in pool.bytes)

    def free_for(self, configuration: Configuration, device: str) -> int:
        """Bytes that a pool of it may take now. Negative when unmanaged memory covers what was granted."""
        free = self.free[device]
        return free if self._policy.lend else free - self.lent(device, configuration.id)

    def offer(self, pool: Pool, device: str) -> int:
        """Bytes of a pool on a device that nobody was promised."""
        promised = self._promised.get(pool.id)
        return pool.bytes.get(device, 0) - (promised.get(device, 0) if promised else 0)

    def take(
        self, configuration: Configuration, bytes_: Mapping[str, int], victims: Iterable[Pool], expected: datetime
    ) -> None:
        """Charge a new pool; what its victims cover is promised to it, in the order in which the ledger does it."""
        victims = sorted(victims, key=lambda pool: pool.id)
        planned = Pool(
            id=f"planned {len(self._planned)}",
            configuration=configuration.id,
            state=PoolState.WAITING,
            bytes=bytes_,
            slots=configuration.slots,
            started=expected,
            expected=expected,
        )
        self._planned.append(planned)
        computes = self.computing(bytes_)
        for device in computes:
            self.active[device] += 1 / len(computes)
        self._coming.setdefault(configuration.id, []).append(planned)
        for device, size in bytes_.items():
            need = size
            if configuration.pinned or configuration.min_pools:
                self.non_preemptible[device] += size
            for victim in victims:
                if part := min(need, self.offer(victim, device)):
                    need -= part
                    promised = self._promised.setdefault(victim.id, {})
                    promised[device] = promised.get(device, 0) + part
            self.on[device].append(planned)
            if self.own(device, configuration.id):
                self._reserved[device][configuration.id] = max(self._reserved[device][configuration.id] - size, 0)
            ranks = self._by_free.get(self.devices[device].type, [])
            at = bisect_left(ranks, (self.free[device], device))
            if at < len(ranks) and ranks[at] == (self.free[device], device):
                del ranks[at]
                insort(ranks, (self.free[device] - need, device))
            self.free[device] -= need

    def usable(self, device: str) -> int:
        """Bytes that it would have free without pools."""
        return self.devices[device].capacity_bytes - self.devices[device].unmanaged_bytes

    def allows(self, configuration: Configuration, device: Device, part: int) -> bool:
        """
        Whether it may be placed there if nobody else was: large enough, its entry lets it, its file is there. A
        stand-in needs no file.
        """
        host = device.host
        return (
            self._is_large_enough(configuration, device.id, part)
            and (device.simulated or configuration.fetch is not None or host in configuration.files)
            and (not configuration.only or device.id in configuration.only or host in configuration.only)
        )

    def _is_large_enough(self, configuration: Configuration, device: str, part: int) -> bool:
        non_preemptible = self.non_preemptible[device] if configuration.pinned or configuration.min_pools else 0
        if non_preemptible and self.own(device, configuration.id) >= part:
            non_preemptible -= part  # it moves into what is set aside for it
        return self.usable(device) - non_preemptible >= part

    def computing(self, devices: Iterable[str]) -> list[str]:
        """Those of a pool's devices that it computes on: RAM beside GPUs only holds what belongs to it."""
        known = list(devices)
        gpus = [id_ for id_ in known if id_ in self.devices and self.devices[id_].kind is DeviceKind.GPU]
        return gpus or known

    def with_ram(self, layout: Layout, devices: DeviceSet) -> DeviceSet:
        """The set, and the RAM of its host where the layout needs some."""
        first = self.devices.get(devices[0])
        ram = self._ram.get(first.host) if first is not None and layout.ram else None
        return devices if ram is None else (*devices, ram)

    def holds(self, reserve: ReservedCapacity, layout: Layout) -> bool:
        """Whether a pool of that layout would lie in what is set aside."""
        computing = tuple(self.computing(reserve.bytes))
        sizes = sorted((reserve.bytes[device] for device in computing), reverse=True)
        beside = self.with_ram(layout, computing)[len(computing) :]
        return (
            len(sizes) == len(layout.parts)
            and all(part <= size for part, size in zip(sorted(layout.parts, reverse=True), sizes, strict=True))
            and all(layout.ram <= reserve.bytes.get(device, 0) for device in beside)
        )

    def has_ram(self, configuration: Configuration, layout: Layout, device: str) -> bool:
        """Whether the RAM beside a device would hold its part if nobody else was there."""
        ram = self._ram.get(self.devices[device].host) if layout.ram else None
        return ram is None or self._is_large_enough(configuration, ram, layout.ram)

    def shunned(self, configuration: Configuration, devices: Iterable[str]) -> list[Pool]:
        """Pools there beside which it is not placed, as its entry or theirs says."""
        apart = self._apart.get(configuration.id)
        if not apart:
            return []
        return [
            pool
            for device in self.computing(devices)
            for pool in self.on[device]
            if pool.configuration in apart and device in self.computing(pool.bytes)
        ]

    def fitting(self, configuration: Configuration, layout: Layout, backed_off: Iterable[str]) -> Iterator[DeviceSet]:
        """
        Device sets whose free bytes hold the layout, some of them in a large fleet: the fullest, or for a configuration
        that is spread the emptiest.
        """
        if len(layout.parts) > 1:
            for devices in self.sets(configuration, layout, backed_off):
                parts = layout.on(devices).items()
                fits = all(self.free_for(configuration, device) >= part for device, part in parts)
                if fits and not self.shunned(configuration, devices):
                    yield devices
            return
        part = layout.parts[0]
        ranks = self._by_free.get(layout.type, [])
        start = bisect_left(ranks, (part, ""))
        order = range(start, len(ranks))
        if configuration.packing is Packing.SPREAD:
            order = range(len(ranks) - 1, start - 1, -1)
        found, enough = 0, self.enough(layout.type)
        for at in order:
            device = self.devices[ranks[at][1]]
            if device.host not in backed_off and self.allows(configuration, device, part):
                devices = self.with_ram(layout, (device.id,))
                fits = all(self.free_for(configuration, d) >= size for d, size in layout.on(devices).items())
                fits = fits and self.has_ram(configuration, layout, device.id)
                if fits and not self.shunned(configuration, devices):
                    yield devices
                    found += 1
                if found >= enough:
                    return

    def enough(self, kind: str) -> int:
        """Devices of a type to look at for a pool on one: all in a small fleet, the likeliest in a large one."""
        count = len(self.open.get(kind, ()))
        return count if count <= self._policy.max_sets else self._policy.max_sets // 4

    def sets(self, configuration: Configuration, layout: Layout, backed_off: Iterable[str]) -> Iterator[DeviceSet]:
        """Device sets that could hold the layout if they were empty. The largest parts lie where most is free."""
        count, smallest = len(layout.parts), min(layout.parts)
        able = [
            device
            for device in self.open.get(layout.type, ())
            if device.host not in backed_off and self.allows(configuration, device, smallest)
        ]
        if count == 1:
            for device in able:
                devices = self.with_ram(layout, (device.id,))
                if self.has_ram(configuration, layout, devices[0]):
                    yield devices
            return
        hosts: dict[str, list[str]] = {}
        for device in able:
            hosts.setdefault(device.host, []).append(device.id)
        each = max(self._policy.max_sets // max(len(hosts), 1), 1)
        for some in hosts.values():
            some.sort(key=lambda device: (-self.free[device], device))
            for chosen in islice(combinations(some, count), each):
                devices = self.with_ram(layout, chosen)
                fits = all(self.usable(device) >= part for device, part in layout.on(devices).items())
                if fits and self.has_ram(configuration, layout, devices[0]):
                    yield devices


def _kept_apart(fleet: Cluster) -> dict[str, set[str]]:
    """By configuration, those that share no device with it: it is enough that one of two says so."""
    named: dict[str, list[str]] = {}
    for one in fleet.configurations:
        named.setdefault(one.model, []).append(one.id)
    found: dict[str, set[str]] = {}
    for one in fleet.configurations:
        for model in one.anti_affinity:
            for other in named.get(model, ()):
                found.setdefault(one.id, set()).add(other)
                found.setdefault(other, set()).add(one.id)
    return found
