"""
The search for candidates: device sets on which a pool could be started, with their victims and costs.

The cost of a candidate is in weighted seconds of waiting: the time that the steps wait until the pool serves, the time
that they lose on slower devices, and the regret for the victims.

Reads the plan state and changes nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice

from app.fleet.backoff import Backoff
from app.fleet.pool import PoolState
from app.footprint.layout import KnownLayout
from app.scheduler.planner.candidate import NO_VICTIMS, PlacementCandidate, Vacancy, Victims
from app.scheduler.planner.cluster import NO_TIME, Cluster, Configuration, Packing, Pool
from app.scheduler.planner.demand import ModelDemand, no_demand
from app.scheduler.planner.device_pools import Departures, DevicePools
from app.scheduler.planner.device_sets import DeviceSets
from app.scheduler.planner.eviction import EVICTABLE, Eviction
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.state import DeviceSet, PlanState

#: Searches without a change of the plan, after which it pays to sort what they look at.
_OFTEN = 3


class Search:
    """Finds candidates for one plan."""

    def __init__(
        self,
        cluster: Cluster,
        demands: Mapping[str, ModelDemand],
        state: PlanState,
        now: datetime,
        policy: PlacementPolicy,
    ) -> None:
        self.sets = DeviceSets(cluster, state, policy)
        self.eviction = Eviction(cluster, demands, state, now, policy)
        self.pools = DevicePools(state, self.eviction, policy)
        self._demands, self._state, self._policy = demands, state, policy
        self._backoffs: dict[str, list[Backoff]] = {}
        for backoff in cluster.backoffs:
            if backoff.until > now:
                self._backoffs.setdefault(backoff.configuration, []).append(backoff)
        #: By configuration, with the revision of the state and the number of devices that are kept.
        self._free_places: dict[str, tuple[tuple[int, int], list[PlacementCandidate]]] = {}
        #: Devices with pools that are moved, but not evicted.
        self._movable = self._find_movable(cluster)
        #: By type of device, whether pools with work are left out, and whether RAM is needed in addition.
        self._ranks: dict[tuple[str, bool, bool], list[tuple[float, int, str]]] = {}
        #: By type of device and class of demand, with the revision of the state.
        self._most: dict[tuple[object, ...], tuple[int, float]] = {}
        #: By type of device, with the revision of the state, and how often they were asked for since.
        self._departures: dict[str, tuple[int, int, Departures | None]] = {}

    def _find_movable(self, cluster: Cluster) -> set[str]:
        """The devices of kept pools; all devices where reserves are not lent, because pools in them are not evicted."""
        kept = self._state.kept
        if not self._policy.lend:
            return set(self._state.devices)
        return {device for pool in cluster.pools if pool.id in kept for device in pool.bytes} if kept else set()

    def backoffs(self, configuration: str) -> list[Backoff]:
        """The backoffs of a configuration that have not ended."""
        return self._backoffs.get(configuration, [])

    def backed_off(self, configuration: str) -> set[str]:
        """Hosts on which the configuration is not started for a while."""
        return {backoff.host for backoff in self.backoffs(configuration)}

    def candidates(self, demand: ModelDemand, evict: bool, moving: bool = False) -> Iterator[PlacementCandidate]:
        """
        Ways to start a pool for the demand now: in free bytes, and with `evict` in those of other pools.

        With `moving`, idle pools of targets make room too, if there are free bytes for them elsewhere. Only device sets
        with such pools are looked at then: the others give what they give without.
        """
        if moving and not self._movable:
            return
        configuration = demand.configuration
        backed_off = self.backed_off(configuration.id)
        fastest = max((layout.tokens_per_second for layout in configuration.layouts), default=1.0)
        for layout in configuration.layouts:
            found = False
            for devices in self.sets.fitting(configuration, layout, backed_off):
                if self.is_open(configuration, devices, layout, demand):
                    found = True
                    yield self.candidate(demand, layout, devices, NO_VICTIMS, fastest)
            if not evict or found:
                continue
            for devices in self.cheapest(demand, layout, backed_off, moving=moving):
                if moving and self._movable.isdisjoint(devices):
                    continue
                if self.is_open(configuration, devices, layout, demand):
                    victims = self.victims(demand, layout, devices, moving)
                    if victims is not None:
                        yield self.candidate(demand, layout, devices, victims, fastest)

    def free_places(self, configuration: Configuration) -> list[PlacementCandidate]:
        """The candidates in free bytes for a pool for which no step waits."""
        revision = self._state.revision, len(self._state.nominated)
        known = self._free_places.get(configuration.id)
        if known is None or known[0] != revision:
            found = list(self.candidates(no_demand(configuration), evict=False))
            self._free_places[configuration.id] = known = (revision, found)
        return known[1]

    def is_open(
        self, configuration: Configuration, devices: DeviceSet, layout: KnownLayout, demand: ModelDemand
    ) -> bool:
        """Whether no device is kept for another model, or is needed by the waiting owner of a reserve."""
        reserves, nominated = self._state.has_idle_reserves, self._state.nominated
        if not reserves and not nominated:
            return True
        for device in devices:
            owners = self._state.reserve_owners(device) if reserves else ()
            if any(self._is_claimed(owner, device) for owner in owners if owner != configuration.id):
                return False
            kept = nominated.get(device)
            if kept is not None and kept[0] != configuration.id:
                each = demand.work / demand.steps if demand.steps else math.inf
                if layout.load.total_seconds() + each + self._policy.unload > kept[1]:
                    return False
        return True

    def _is_claimed(self, owner: str, device: str) -> bool:
        """Whether the owner of a reserve on the device lends nothing: steps wait for it and no pool of it is coming."""
        demand = self._demands.get(owner)
        return (
            demand is not None
            and demand.steps > 0
            and not self._state.count_coming(owner)
            and self._state.devices[device].host not in self.backed_off(owner)
        )

    def cheapest(
        self, demand: ModelDemand, layout: KnownLayout, backed_off: set[str], *, moving: bool = False
    ) -> Iterator[DeviceSet]:
        """Device sets to look at for victims: all in a small cluster, else those with the least regret."""
        state, enough = self._state, self.sets.enough(layout.type)
        if len(layout.parts) > 1 or len(state.schedulable.get(layout.type, ())) == enough:
            yield from self.sets.possible(demand.configuration, layout, backed_off)
            return
        part, found = layout.parts[0], 0
        every = self.sets.takes_all(demand.configuration, layout, part, backed_off)
        for _, size, id_ in self._ranked(layout, idle=not demand.overdue):
            if size + state.free[id_] < part:
                continue
            device = state.devices[id_]
            if every or (device.host not in backed_off and self.sets.allows(demand.configuration, device, part)):
                if not layout.ram:
                    yield (id_,)
                elif self._has_ram(demand, layout, id_, moving):
                    yield state.with_ram(layout, (id_,))
                else:
                    continue
                found += 1
                if found >= enough:
                    return

    def _has_ram(self, demand: ModelDemand, layout: KnownLayout, device: str, moving: bool) -> bool:
        """Whether the RAM of the device's host is free, or in what the demand may evict; with `moving`, or may move."""
        state, configuration = self._state, demand.configuration
        ram = state.ram_for(layout, device)
        if ram is None or not self.sets.has_ram(configuration, layout, device):
            return ram is None
        missing = layout.ram - state.free_for(configuration, ram)
        is_own = state.own_reserve(ram, configuration.id) >= layout.ram
        return moving or is_own or missing <= 0 or missing <= self.pools.evictable(demand).on(ram).total

    def most_bytes(self, demand: ModelDemand, type_: str) -> float:
        """
        No device of the type has more bytes that are free or that the demand may evict; see `DevicePools`.

        Infinite where that is not known: in a large cluster, and when it is asked for once only.
        """
        devices, state = self._state.schedulable.get(type_, ()), self._state
        if len(devices) > self._policy.max_sets:
            return math.inf
        key = (type_, demand.rank, demand.overdue, demand.configuration.id if not self._policy.lend else "")
        revision, most = self._most.get(key, (-1, math.inf))
        if revision != state.revision:  # computed when it is asked for again: most often the plan has changed then
            most = math.inf
        elif most == math.inf:
            evictable = self.pools.evictable(demand)
            most = max((state.free[d.id] + evictable.on(d.id).total for d in devices), default=0)
        self._most[key] = (state.revision, most)
        return most

    def _ranked(self, layout: KnownLayout, idle: bool) -> list[tuple[float, int, str]]:
        """
        Devices of a layout's type, by the regret for each byte of the pools on them, with those bytes.

        A device without such pools is left out, unless the layout needs RAM too: then that of its host is what is
        missing, and the pools there count. Devices are ranked once in a plan: it is a guess where to look, and what is
        found there is checked.
        """
        key = layout.type, idle, layout.ram > 0
        if (known := self._ranks.get(key)) is None:
            known, state = [], self._state
            for device in state.schedulable.get(layout.type, ()):
                regret, size = self._evictable_regret(device.id, idle)
                if size:
                    known.append((regret / size, size, device.id))
                elif ram := state.ram_for(layout, device.id):
                    regret, in_ram = self._evictable_regret(ram, idle)
                    if in_ram:
                        known.append((regret / in_ram, 0, device.id))
            known.sort()
            self._ranks[key] = known
        return known

    def _evictable_regret(self, device: str, idle: bool) -> tuple[float, int]:
        """The regret for the pools on a device that some demand may evict, and their bytes; with `idle`, of those."""
        regret, size = 0.0, 0
        for pool in self._state.pools_on[device]:
            if (idle and pool.busy) or pool.state not in EVICTABLE or pool.id in self._state.kept:
                continue
            regret += self.eviction.regret(pool)
            size += self._state.unpromised(pool, device)
        return regret, size

    def victims(self, demand: ModelDemand, layout: KnownLayout, devices: DeviceSet, moving: bool) -> Victims | None:
        """
        Pools whose bytes are enough for what is missing; None when there are none.

        Idle pools come first, then those with the least regret for each byte, then those unused for the longest time.
        """
        eviction = self.eviction
        missing = self._state.missing(demand.configuration, layout, devices)
        reclaims = self._state.reclaims(demand.configuration, layout, devices)
        conflicts = {pool.id: pool for pool in self.sets.conflicts(demand.configuration, devices)}
        if len(devices) == 1 and not (conflicts or reclaims or moving):
            chosen = self._fewest_on(demand, devices[0], missing[devices[0]])
        elif not (reclaims or moving) and any(
            size > self.pools.evictable(demand).on(device).total for device, size in missing.items() if size > 0
        ):
            return None
        else:
            chosen = self._fewest(demand, devices, missing, conflicts, reclaims=reclaims, moving=moving)
        if chosen is None:
            return None
        chosen += [(eviction.regret(pool), pool) for _, pool in sorted(conflicts.items())]
        victims = tuple(pool for _, pool in chosen)
        kept = [pool for pool in victims if eviction.is_kept(pool) and not reclaims]
        moves = self.relocate(kept, layout.on(devices), victims) if kept else ()
        if moves is None:
            return None
        wait = max((eviction.seconds_to_free(pool, demand, reclaims) for pool in victims), default=0.0)
        return Victims(victims, sum(regret for regret, _ in chosen), wait, moves)

    def _fewest(
        self,
        demand: ModelDemand,
        devices: DeviceSet,
        missing: dict[str, int],
        conflicts: Mapping[str, Pool],
        *,
        reclaims: bool,
        moving: bool,
    ) -> list[tuple[float, Pool]] | None:
        """
        The pools to stop in addition to the conflicts, with the regret for each; None when there are not enough.

        `missing` is what no pool holds, and is changed.
        """
        eviction, unpromised = self.eviction, self._state.unpromised
        # The owner of a reserve stops a pool that loads there too.
        states = EVICTABLE | {PoolState.STARTING} if reclaims else EVICTABLE
        if any(p.state not in states or not eviction.may_evict(p, demand, reclaims) for p in conflicts.values()):
            return None
        for pool in conflicts.values():
            for d in missing:
                missing[d] -= unpromised(pool, d)
        pools = {pool.id: pool for d in devices for pool in self._state.pools_on[d] if pool.state in states}
        ranked = []
        for pool in pools.values():
            if pool.id in conflicts:
                continue
            size = sum(min(unpromised(pool, d), m) for d, m in missing.items() if m > 0)
            if size > 0 and (eviction.may_evict(pool, demand, reclaims) or (moving and eviction.may_move(pool))):
                regret = eviction.regret(pool)
                idle = pool.state is not PoolState.STARTING and not pool.busy
                ranked.append((not idle, regret / size, pool.used, pool.id, regret, pool))
        ranked.sort(key=lambda entry: entry[:4])
        chosen: list[tuple[float, Pool]] = []
        for *_, regret, pool in ranked:
            if any(m > 0 and unpromised(pool, d) > 0 for d, m in missing.items()):
                chosen.append((regret, pool))
                for d in missing:
                    missing[d] -= unpromised(pool, d)
        if any(m > 0 for m in missing.values()):
            return None
        for regret, pool in sorted(chosen, key=lambda entry: (-entry[0], entry[1].id)):
            if all(m + unpromised(pool, d) <= 0 for d, m in missing.items()):  # the others suffice
                chosen.remove((regret, pool))
                for d in missing:
                    missing[d] += unpromised(pool, d)
        return chosen

    def _fewest_on(self, demand: ModelDemand, device: str, missing: int) -> list[tuple[float, Pool]] | None:
        """The same on one device, where nothing conflicts, moves or is reclaimed: most searches are of that kind."""
        if missing <= 0:
            return []
        evictable = self.pools.evictable(demand).on(device)
        if evictable.total < missing:
            return None
        ranked = sorted(
            (works, regret / min(size, missing), pool.used, pool.id, regret, size, pool)
            for pool, size, regret, works, _, certain in evictable.pools
            if certain or self.eviction.may_evict(pool, demand, reclaims=False)
        )
        left, count = missing, 0
        for *_, size, _ in ranked:
            if left <= 0:
                break
            left -= size
            count += 1
        if left > 0:
            return None
        chosen = [(regret, pool) for *_, regret, _, pool in ranked[:count]]
        if count > 1:
            for *_, regret, size, pool in sorted(ranked[:count], key=lambda entry: (-entry[4], entry[3])):
                if left + size <= 0:  # the others suffice
                    chosen.remove((regret, pool))
                    left += size
        return chosen

    def relocate(
        self, pools: Sequence[Pool], needs: Mapping[str, int], victims: Sequence[Pool]
    ) -> tuple[tuple[Pool, PlacementCandidate], ...] | None:
        """
        A place in free bytes for each of the pools on other devices; None when one of them finds none.

        Bytes of the host's RAM may be on the same host, in addition to those of `needs` that the victims do not cover.
        """
        state = self._state
        taken = {d: max(need - sum(state.unpromised(v, d) for v in victims), 0) for d, need in needs.items()}
        leaving = set(state.computing(needs))
        moves = []
        for pool in sorted(pools, key=lambda p: (-sum(p.bytes.values()), p.id)):
            found = [
                candidate
                for candidate in self.free_places(self.eviction.configurations[pool.configuration])
                if not leaving & set(candidate.computing)
                and all(state.free[d] - taken.get(d, 0) >= size for d, size in candidate.bytes.items())
            ]
            if not found:
                return None
            best = min(found, key=lambda candidate: candidate.order)
            taken |= {device: taken.get(device, 0) + size for device, size in best.bytes.items()}
            moves.append((pool, best))
        return tuple(moves)

    def candidate(
        self, demand: ModelDemand, layout: KnownLayout, devices: DeviceSet, victims: Victims, fastest: float
    ) -> PlacementCandidate:
        configuration, state = demand.configuration, self._state
        computing, first = devices[: len(layout.parts)], state.devices[devices[0]]
        fetch = configuration.files.get(first.host, configuration.fetch or NO_TIME).total_seconds()
        estimate = max(victims.wait, fetch) + layout.load.total_seconds()
        working = [victim for victim in victims.pools if victim.busy > 0]
        sharing = self.sharing(computing, working)
        cost = round(self.waiting_cost(demand, layout, computing, estimate, sharing, fastest) + victims.regret, 3)
        borrows = state.borrows(configuration.id, devices)
        left = sum(state.free[d] - part for d, part in zip(devices, layout.parts, strict=False))
        spread: tuple[float, ...] = (0.0, 0.0, left)
        if configuration.packing is Packing.SPREAD:
            stopped = {victim.id for victim in victims.pools}
            replicas = [p for p in state.pools_of(configuration.id) if p.id not in stopped]
            same_devices = sum(bool(p.bytes.keys() & set(computing)) for p in replicas)
            same_host = sum(
                any(state.devices[d].host == first.host for d in p.bytes if d in state.devices) for p in replicas
            )
            spread = (same_devices, same_host, -left)
        order = (borrows, bool(working), cost, *spread, *devices)
        return PlacementCandidate(
            layout, devices, victims.pools, victims.regret, estimate, cost, borrows, order, victims.moves
        )

    def sharing(self, computing: Sequence[str], leaving: Sequence[Pool]) -> float:
        """How many pools work on each of the devices, on average, once some of them have left."""
        active, state = self._state.active, self._state
        if not leaving:
            if len(computing) == 1:
                return active[computing[0]]
            return sum(active[d] for d in computing) / len(computing)
        return sum(
            active[d] - sum((d in v.bytes) / len(state.computing(v.bytes)) for v in leaving) for d in computing
        ) / len(computing)

    def waiting_cost(
        self,
        demand: ModelDemand,
        layout: KnownLayout,
        computing: Sequence[str],
        estimate: float,
        sharing: float,
        fastest: float,
    ) -> float:
        """Weighted seconds that the steps wait until the pool serves, and lose on devices that are slow or shared."""
        speed = layout.tokens_per_second * min(self._state.devices[d].speed for d in computing)
        each = demand.work / demand.steps if demand.steps else 0.0
        slower = each * (fastest / max(speed, 1e-9) * (1 + sharing) - 1)
        return (demand.growth or demand.upcoming) * (estimate + slower)

    def soonest_vacancy(self, demand: ModelDemand) -> Vacancy | None:
        """The device set that pools leave first without an eviction; None when no set will ever be free."""
        configuration = demand.configuration
        backed_off = self.backed_off(configuration.id)
        best: tuple[float, DeviceSet, tuple[Pool, ...]] | None = None
        for layout in configuration.layouts:
            for devices in self._vacating(configuration, layout, backed_off):
                seconds = self._least_seconds(configuration, layout, devices)
                if seconds is None or (best is not None and (seconds, devices) >= best[:2]):
                    continue
                pools = self._leaving(configuration, layout, devices)
                if pools is not None:
                    found = max((after for after, _ in pools), default=0.0), devices, tuple(p for _, p in pools)
                    best = found if best is None else min(best, found, key=lambda one: one[:2])
        return None if best is None else Vacancy(*best)

    def _vacating(
        self, configuration: Configuration, layout: KnownLayout, backed_off: Collection[str]
    ) -> Iterable[DeviceSet]:
        """Device sets to look at for a vacancy; the first one to have the bytes, where nothing else is looked at."""
        state, sets = self._state, self.sets
        part = layout.parts[0]
        is_plain = len(layout.parts) == 1 and not layout.ram and not state.has_idle_reserves
        is_plain = is_plain and not sets.conflicts_with(configuration)
        departures = None
        if is_plain and sets.takes_all(configuration, layout, part, backed_off):
            departures = self._departures_of(layout.type)
        if departures is None:
            return islice(sets.possible(configuration, layout, backed_off), self._policy.max_sets)
        first = departures.first(part)
        return () if first is None else ((first[1],),)

    def _departures_of(self, type_: str) -> Departures | None:
        """Of the devices of a type; None until it is asked for repeatedly, as they cost as much as a few searches."""
        revision, asked, found = self._departures.get(type_, (-1, 0, None))
        if revision != self._state.revision:
            revision, asked, found = self._state.revision, 0, None
        if found is None and asked >= _OFTEN:
            devices = self._state.schedulable.get(type_, ())[: self._policy.max_sets]
            found = self.pools.departures([device.id for device in devices])
        self._departures[type_] = (revision, asked + 1, found)
        return found

    def _least_seconds(self, configuration: Configuration, layout: KnownLayout, devices: DeviceSet) -> float | None:
        """No pools leave the bytes of the layout sooner; None when they never do."""
        if len(devices) == 1:
            return self.pools.leaving(devices[0]).least(
                layout.parts[0] - self._state.free_for(configuration, devices[0])
            )
        least = 0.0
        for device, missing in self._state.missing(configuration, layout, devices).items():
            seconds = self.pools.leaving(device).least(missing)
            if seconds is None:
                return None
            least = max(least, seconds)
        return least

    def _leaving(
        self, configuration: Configuration, layout: KnownLayout, devices: DeviceSet
    ) -> list[tuple[float, Pool]] | None:
        """The pools that leave the bytes of the layout first, with the time that each takes; None when too few do."""
        missing = self._state.missing(configuration, layout, devices)
        if len(devices) == 1 and not self.sets.conflicts_with(configuration):
            leaving, need = self.pools.leaving(devices[0]), missing[devices[0]]
            count = bisect_left(leaving.sizes, need) if need > 0 else 0
            return list(zip(leaving.seconds[:count], leaving.pools[:count], strict=True))
        pools: dict[str, tuple[float, Pool]] = {}
        for device in devices:
            leaving = self.pools.leaving(device)
            pools.update(
                (pool.id, (seconds, pool)) for pool, seconds in zip(leaving.pools, leaving.seconds, strict=True)
            )
        conflicts = {pool.id for pool in self.sets.conflicts(configuration, devices)}
        if not conflicts <= pools.keys():
            return None
        found: list[tuple[float, Pool]] = []
        for _, seconds, id_, pool in sorted((id_ not in conflicts, s, id_, pool) for id_, (s, pool) in pools.items()):
            if id_ not in conflicts and all(m <= 0 for m in missing.values()):
                break
            found.append((seconds, pool))
            for d in missing:
                missing[d] -= self._state.unpromised(pool, d)
        return None if any(m > 0 for m in missing.values()) else found
