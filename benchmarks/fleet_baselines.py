"""
The rules of others, as planners of the simulated fleet: our models of what their code does, not the products.

Each treats the whole fleet as one machine, which is more than most of them can.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256

from app.fleet.host import HostState
from app.fleet.pool import COMING, PoolState
from app.scheduler.planner.cluster import Cluster, Configuration, Device, Pool, charges
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.plan import Action, Plan, Purpose, StartPool, StopMode, StopPool

Bytes = Mapping[str, int]


def free(fleet: Cluster) -> dict[str, int]:
    charged = charges(fleet)
    return {d.id: d.capacity_bytes - charged[d.id] if d.state is HostState.SCHEDULABLE else 0 for d in fleet.devices}


def stop(pool: Pool) -> StopPool:
    return StopPool(pool.id, StopMode.DRAIN, "rule")


def start(configuration: str, sizes: Bytes, after: frozenset[str] = frozenset()) -> StartPool:
    return StartPool(configuration, sizes, Purpose.DEMAND, "rule", timedelta(0), after)


def missing(fleet: Cluster, demand: Sequence[WaitingSteps]) -> list[str]:
    """Configurations that are waited for and have no pool, the longest waited for first."""
    there = {p.configuration for p in fleet.pools if p.state in COMING}
    oldest: dict[str, datetime] = {}
    for one in demand:
        if one.ready is None and one.model not in there:
            oldest[one.model] = min(oldest.get(one.model, one.oldest), one.oldest)
    return sorted(oldest, key=lambda c: (oldest[c], c))


def sets(fleet: Cluster, configuration: Configuration) -> list[tuple[tuple[str, ...], int]]:
    """Device sets of one host for a configuration, with the bytes of each part."""
    found = []
    for layout in configuration.layouts:
        by_host: dict[str, list[Device]] = {}
        for device in fleet.devices:
            if device.state is HostState.SCHEDULABLE and device.capacity_bytes >= layout.parts[0]:
                by_host.setdefault(device.host, []).append(device)
        for devices in by_host.values():
            n = len(layout.parts)
            if n == 1:
                found += [((d.id,), layout.parts[0]) for d in devices]
            elif len(devices) >= n:
                found.append((tuple(d.id for d in devices[:n]), layout.parts[0]))
    return found


def idle_first(pools: Sequence[Pool]) -> list[Pool]:
    return sorted(pools, key=lambda p: (p.busy > 0, p.used, p.id))


@dataclass
class Ollama:
    """
    One load at a time, which all that wait for a load wait for; 80 % of the free bytes of one device, else of all
    together; the first idle pool by the hash of its file goes, else the first by that, which others still join.
    """

    #: Hashes differ by seed, so that no run picks its victims by size.
    seed: int = 0

    name: str = "Ollama's rule"
    by_class: bool = False
    drain: float = math.inf
    victim: str | None = None

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], now: datetime) -> Plan:
        pools = {p.id: p for p in fleet.pools}
        keep = timedelta(minutes=5)
        expired = [p for p in fleet.pools if p.state is PoolState.SERVING and not p.busy and now - p.used >= keep]
        if any(p.state is not PoolState.SERVING for p in fleet.pools):
            return Plan()
        waiting = missing(fleet, demand)
        if not waiting:
            self.victim = None
            return Plan(tuple(stop(p) for p in expired))
        if self.victim in pools:
            if pools[self.victim].busy:
                return Plan()
            return Plan((stop(pools[self.victim]),))
        needs = next(c for c in fleet.configurations if c.id == waiting[0])
        size = needs.layouts[0].total_bytes
        room = free(fleet)
        best = max(room, key=lambda d: (room[d], d))
        open_ = [d for d in fleet.devices if d.state is HostState.SCHEDULABLE]
        if len(fleet.pools) < 3 * len(open_):
            empty = not fleet.pools
            if size <= room[best] * (1.0 if room[best] == self.capacity(fleet, best) else 0.8):
                return Plan((start(needs.id, {best: size}),))
            total = sum(room.values())
            if size <= total * (1.0 if empty else 0.8) and room:
                # Layers are laid out in proportion to what is free.
                sizes = {d: int(size * free_ / total) for d, free_ in room.items() if free_ > 0}
                return Plan((start(needs.id, sizes),))
        if not fleet.pools:
            return Plan()
        order = sorted(fleet.pools, key=lambda p: sha256(f"{self.seed} {p.configuration}".encode()).digest())
        victim = next((p for p in order if not p.busy), order[0])
        self.victim = victim.id
        return Plan((stop(victim),)) if not victim.busy else Plan()

    @staticmethod
    def capacity(fleet: Cluster, device: str) -> int:
        return next(d.capacity_bytes for d in fleet.devices if d.id == device)


@dataclass
class Lru:
    """Exact bytes, one swap at a time, the least recently used first, draining who works."""

    name: str = "LRU, serial drain"
    by_class: bool = False
    drain: float = math.inf
    drains: bool = True

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], _now: datetime) -> Plan:
        if any(p.state is not PoolState.SERVING for p in fleet.pools):
            return Plan()
        room = free(fleet)
        of = {c.id: c for c in fleet.configurations}
        for name in missing(fleet, demand):
            options = sets(fleet, of[name])
            fitting = [(d, part) for d, part in options if all(room[x] >= part for x in d)]
            if fitting:
                devices, part = min(fitting, key=lambda o: (sum(room[x] for x in o[0]), o[0]))
                return Plan((start(name, dict.fromkeys(devices, part)),))
            best: list[Pool] | None = None
            for devices, part in options:
                victims: list[Pool] = []
                order = idle_first([p for p in fleet.pools if p.bytes.keys() & set(devices)])
                if not self.drains:
                    order = [p for p in order if not p.busy]
                left = {d: room[d] for d in devices}
                for pool in order:
                    if all(left[d] >= part for d in devices):
                        break
                    if any(left[d] < part and pool.bytes.get(d, 0) for d in devices):
                        victims.append(pool)
                        for d in devices:
                            left[d] += pool.bytes.get(d, 0)
                if all(left[d] >= part for d in devices):
                    key = [(p.busy > 0, p.used) for p in victims]
                    if best is None or max(key) < max((p.busy > 0, p.used) for p in best):
                        best, chosen = victims, (devices, part)
            if best:
                after = frozenset(p.id for p in best)
                return Plan((*(stop(p) for p in best), start(name, dict.fromkeys(*chosen), after)))
            return Plan()  # the head of the line waits, and all behind it
        return Plan()


@dataclass
class LruParallel:
    """
    Exact bytes; the least recently used idle pools go; loads run at the same time and nobody waits behind one that
    fits nowhere; queues by class. Pools with work are waited for.
    """

    name: str = "LRU, parallel"
    by_class: bool = True
    drain: float = math.inf

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], _now: datetime) -> Plan:
        room, of = Counter(free(fleet)), {c.id: c for c in fleet.configurations}
        idle = {p.id: p for p in fleet.pools if p.state is PoolState.SERVING and not p.busy}
        wanted = {one.model for one in demand if one.ready is None}
        ranks = {name: min(one.priority.rank for one in demand if one.model == name) for name in wanted}
        actions: list[Action] = []
        for name in sorted(missing(fleet, demand), key=ranks.__getitem__):
            best: tuple[tuple[object, ...], list[Pool], Bytes] | None = None
            for devices, part in sets(fleet, of[name]):
                left = {d: part - room[d] for d in devices}
                victims = []
                for pool in sorted(idle.values(), key=lambda p: (p.used, p.id)):
                    if pool.configuration not in wanted and any(left[d] > 0 and pool.bytes.get(d, 0) for d in devices):
                        victims.append(pool)
                        for d in devices:
                            left[d] -= pool.bytes.get(d, 0)
                if all(size <= 0 for size in left.values()):
                    # Without a victim the fullest device, else the one whose victims were used longest ago.
                    last = [max(p.used for p in victims)] if victims else []
                    key = (bool(victims), last, sum(room[d] for d in devices), devices)
                    if best is None or key < best[0]:
                        best = key, victims, dict.fromkeys(devices, part)
            if best is None:
                continue
            _, victims, sizes = best
            actions += [stop(p) for p in victims]
            actions.append(start(name, sizes, frozenset(p.id for p in victims)))
            for pool in victims:
                del idle[pool.id]
            for d, size in sizes.items():
                room[d] -= max(size - sum(p.bytes.get(d, 0) for p in victims), 0)
        return Plan(tuple(actions))


@dataclass
class Exclusive:
    """llama-swap by default: one model on each host; who is asked for first comes next, busy pools are waited for."""

    name: str = "llama-swap, exclusive"
    by_class: bool = False
    drain: float = math.inf

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], _now: datetime) -> Plan:
        hosts: dict[str, list[Device]] = {}
        for d in fleet.devices:
            if d.state is HostState.SCHEDULABLE:
                hosts.setdefault(d.host, []).append(d)
        of = {c.id: c for c in fleet.configurations}
        actions: list[Action] = []
        taken: set[str] = set()
        for name in missing(fleet, demand):
            ranked = []
            for host, devices in hosts.items():
                held = [p for p in fleet.pools if p.bytes.keys() & {d.id for d in devices}]
                if host in taken or any(p.state is not PoolState.SERVING for p in held):
                    continue
                size = of[name].layouts[0].total_bytes
                if size <= sum(d.capacity_bytes for d in devices):
                    ranked.append((any(p.busy for p in held), [p.used for p in held], host, held))
            if not ranked:
                continue
            _, _, host, held = min(ranked, key=lambda r: r[:3])
            taken.add(host)
            total = sum(d.capacity_bytes for d in hosts[host])
            sizes = {d.id: int(size * d.capacity_bytes / total) for d in hosts[host]}
            single = [d for d in hosts[host] if d.capacity_bytes >= size]
            if single:
                sizes = {single[0].id: size}
            actions += [stop(p) for p in held]
            actions.append(start(name, sizes, frozenset(p.id for p in held)))
        return Plan(tuple(actions))


@dataclass
class Static:
    """Models divided over devices beforehand, evenly by bytes; on each device they are swapped one for the other."""

    name: str = "static partition"
    by_class: bool = False
    drain: float = math.inf
    homes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], _now: datetime) -> Plan:
        if not self.homes:
            used = {d.id: 0 for d in fleet.devices}
            for c in sorted(fleet.configurations, key=lambda c: -c.layouts[0].total_bytes):
                options = sets(fleet, c)
                devices, part = min(options, key=lambda o: (max(used[d] for d in o[0]), o[0]))
                self.homes[c.id] = devices
                for d in devices:
                    used[d] += part
        room = free(fleet)
        of = {c.id: c for c in fleet.configurations}
        is_open = {d.id: d.state is HostState.SCHEDULABLE for d in fleet.devices}
        actions: list[Action] = []
        taken: set[str] = set()
        for name in missing(fleet, demand):
            devices = self.homes[name]
            if taken & set(devices) or not all(is_open[d] for d in devices):
                continue
            held = [p for p in fleet.pools if p.bytes.keys() & set(devices)]
            if any(p.state is not PoolState.SERVING for p in held):
                taken |= set(devices)
                continue
            taken |= set(devices)
            part = of[name].layouts[0].parts[0]
            victims: list[Pool] = []
            for pool in idle_first(held):
                if all(room[d] >= part for d in devices):
                    break
                if any(room[d] < part and pool.bytes.get(d, 0) for d in devices):
                    victims.append(pool)
                    taken |= set(pool.bytes)
                    for d in pool.bytes:
                        room[d] += pool.bytes[d]
            for d in devices:
                room[d] -= part
            actions += [stop(p) for p in victims]
            actions.append(start(name, dict.fromkeys(devices, part), frozenset(p.id for p in victims)))
        return Plan(tuple(actions))
