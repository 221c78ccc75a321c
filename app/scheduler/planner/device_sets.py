"""
Device sets: where a layout fits now, where it would fit without other pools, and which models may not share a device.

In a large cluster only the most likely sets are looked at, so that the time of a plan stays bounded.

Reads the plan state and changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from itertools import combinations, islice

from app.devices.device import HardwareKind
from app.footprint.layout import KnownLayout
from app.scheduler.planner.cluster import Cluster, Configuration, Device, Packing, Pool
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.state import DeviceSet, PlanState


class DeviceSets:
    """Finds device sets for layouts."""

    def __init__(self, cluster: Cluster, state: PlanState, policy: PlacementPolicy) -> None:
        self._state, self._max_sets = state, policy.max_sets
        self._anti_affinity = _anti_affinity(cluster)

    def fitting(
        self, configuration: Configuration, layout: KnownLayout, backed_off: Collection[str]
    ) -> Iterator[DeviceSet]:
        """
        Device sets whose free bytes hold the layout: the fullest first, or the emptiest for a configuration that is
        spread. `backed_off` are hosts to leave out.
        """
        state = self._state
        if len(layout.parts) > 1:
            for devices in self.possible(configuration, layout, backed_off):
                parts = layout.on(devices).items()
                fits = all(state.free_for(configuration, device) >= part for device, part in parts)
                if fits and not self.conflicts(configuration, devices):
                    yield devices
            return
        part = layout.parts[0]
        ranks = state.by_free.get(layout.type, [])
        start = bisect_left(ranks, (part, ""))
        order = range(start, len(ranks))
        if configuration.packing is Packing.SPREAD:
            order = range(len(ranks) - 1, start - 1, -1)
        found, enough = 0, self.enough(layout.type)
        every = self.takes_all(configuration, layout, part, backed_off)
        conflicts = self.conflicts_with(configuration)
        if every and not layout.ram and not state.has_idle_reserves and not conflicts:
            yield from ((ranks[at][1],) for at in islice(order, max(enough, 1)))  # nothing is left to check
            return
        for at in order:
            device = state.devices[ranks[at][1]]
            if every or (device.host not in backed_off and self.allows(configuration, device, part)):
                devices = (device.id,)
                if not layout.ram:
                    fits = state.free_for(configuration, device.id) >= part
                else:
                    devices = state.with_ram(layout, devices)
                    fits = all(state.free_for(configuration, d) >= size for d, size in layout.on(devices).items())
                    fits = fits and self.has_ram(configuration, layout, device.id)
                if fits and not (conflicts and self.conflicts(configuration, devices)):
                    yield devices
                    found += 1
                if found >= enough:
                    return

    def possible(
        self, configuration: Configuration, layout: KnownLayout, backed_off: Collection[str]
    ) -> Iterator[DeviceSet]:
        """Device sets that would hold the layout if they were empty. Of a split layout, those with most free first."""
        state, count = self._state, len(layout.parts)
        if count == 1:
            part, ram = layout.parts[0], layout.ram
            every = self.takes_all(configuration, layout, part, backed_off)
            for device in state.schedulable.get(layout.type, ()):
                if every or (device.host not in backed_off and self.allows(configuration, device, part)):
                    devices: DeviceSet = (device.id,)
                    if not ram:
                        yield devices
                    elif self.has_ram(configuration, layout, device.id):
                        yield state.with_ram(layout, devices)
            return
        hosts = self._hosts(configuration, layout, backed_off)
        each = max(self._max_sets // max(len(hosts), 1), 1)
        roomy = not layout.ram and max(layout.parts) <= state.smallest.get(layout.type, 0)
        for some in hosts:
            for chosen in islice(combinations(some, count), each):
                if roomy:
                    yield chosen
                    continue
                devices = state.with_ram(layout, chosen)
                fits = all(state.usable[device] >= part for device, part in layout.on(devices).items())
                if fits and self.has_ram(configuration, layout, devices[0]):
                    yield devices

    def _hosts(self, configuration: Configuration, layout: KnownLayout, backed_off: Collection[str]) -> list[list[str]]:
        """Of each host, the devices that may hold a part of a split layout, those with most free first."""
        state, smallest = self._state, min(layout.parts)
        if self.takes_all(configuration, layout, smallest, backed_off):
            return [[id_ for _, id_ in ranked] for ranked in state.emptiest.get(layout.type, {}).values()]
        hosts: dict[str, list[str]] = {}
        for device in state.schedulable.get(layout.type, ()):
            if device.host not in backed_off and self.allows(configuration, device, smallest):
                hosts.setdefault(device.host, []).append(device.id)
        for some in hosts.values():
            some.sort(key=lambda device: (-state.free[device], device))
        return list(hosts.values())

    def takes_all(
        self, configuration: Configuration, layout: KnownLayout, part: int, backed_off: Collection[str]
    ) -> bool:
        """Whether every schedulable device of the type is allowed, seen at one glance; False says nothing."""
        state = self._state
        hosts = state.emptiest.get(layout.type, {})
        return (
            not configuration.only
            and not backed_off
            and part <= state.smallest.get(layout.type, 0)
            and not state.keeps_next(configuration)
            and (configuration.fetch is not None or hosts.keys() <= configuration.files.keys())
        )

    def enough(self, type_: str) -> int:
        """Number of devices of a type to look at for a pool on one: all in a small cluster, fewer in a large one."""
        count = len(self._state.schedulable.get(type_, ()))
        return count if count <= self._max_sets else self._max_sets // 4

    def allows(self, configuration: Configuration, device: Device, part: int) -> bool:
        """
        Whether the configuration may be placed on the device if no other pool was there: the device is large enough,
        the entry of the model allows it, and the host has the file. A simulated device needs no file.
        """
        host = device.host
        return (
            self._is_large_enough(configuration, device.id, part)
            and (
                device.kind is HardwareKind.SIMULATED or configuration.fetch is not None or host in configuration.files
            )
            and (not configuration.only or device.id in configuration.only or host in configuration.only)
        )

    def has_ram(self, configuration: Configuration, layout: KnownLayout, device: str) -> bool:
        """Whether the RAM of the device's host would hold its part of the layout if no other pool was there."""
        ram = self._state.ram_for(layout, device)
        return ram is None or self._is_large_enough(configuration, ram, layout.ram)

    def _is_large_enough(self, configuration: Configuration, device: str, part: int) -> bool:
        state = self._state
        taken = state.non_preemptible[device] if state.keeps_next(configuration) else 0
        if taken and state.own_reserve(device, configuration.id) >= part:
            taken -= part  # it uses its own reserve
        return state.usable[device] - taken >= part

    def conflicts_with(self, configuration: Configuration) -> Collection[str]:
        """Configurations that share no device with it."""
        return self._anti_affinity.get(configuration.id, ())

    def conflicts(self, configuration: Configuration, devices: Iterable[str]) -> list[Pool]:
        """Pools on the devices with which the configuration may not share one (anti-affinity of either)."""
        others = self._anti_affinity.get(configuration.id)
        if not others:
            return []
        return [
            pool
            for device in self._state.computing(devices)
            for pool in self._state.pools_on[device]
            if pool.configuration in others and device in self._state.computing(pool.bytes)
        ]


def _anti_affinity(cluster: Cluster) -> dict[str, set[str]]:
    """By configuration, those that share no device with it: it is enough that one of the two entries says so."""
    by_model: dict[str, list[str]] = {}
    for one in cluster.configurations:
        by_model.setdefault(one.model, []).append(one.id)
    found: dict[str, set[str]] = {}
    for one in cluster.configurations:
        for model in one.anti_affinity:
            for other in by_model.get(model, ()):
                found.setdefault(one.id, set()).add(other)
                found.setdefault(other, set()).add(one.id)
    return found
