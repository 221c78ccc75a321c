"""
The search for a place: which devices a pool would be started on, which pools would make room, and what that costs.

The cost of an option is in weighted seconds of waiting: what the steps that wait go on waiting until it serves, what it
is slower there, and the regret for the pools that would be stopped.
The regret for a pool is what its next steps are expected to wait because it is gone (as in GreedyDual: FaasCache,
ASPLOS 2021): likely to be asked for soon, slow to load, much used.
A pool with work is stopped only for a higher class than what it works on, for an equal class that has waited for a
multiple of the regret for it, for a step that waited beyond its bound, or for bytes that are set aside for another.
But for the last, it is stopped only once its own start has paid for itself, and not while it works on a step that was
handed back too often: a drain that lasts too long would hand that back again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from app.fleet.backoff import Backoff
from app.fleet.pool import PoolState
from app.scheduler.cluster import NOTHING, Cluster, Configuration, DeviceState, Layout, Packing, Pool
from app.scheduler.option import Option
from app.scheduler.policy import PlacementPolicy
from app.scheduler.pressure import NO_RANK, ConfigurationDemand, load_of, nothing
from app.scheduler.room import DeviceSet, Room

#: States in which a pool's bytes can be promised to others.
_YIELDING = frozenset({PoolState.SERVING, PoolState.DRAINING})


@dataclass(frozen=True, slots=True)
class _Cover:
    victims: tuple[Pool, ...]
    regret: float
    #: Seconds until all of them are gone.
    wait: float
    moves: tuple[tuple[Pool, Option], ...]


#: Nothing has to be covered.
_FREE = _Cover((), 0.0, 0.0, ())


class Search:
    """Finds options for one plan."""

    def __init__(
        self,
        fleet: Cluster,
        wants: Mapping[str, ConfigurationDemand],
        room: Room,
        now: datetime,
        policy: PlacementPolicy,
    ) -> None:
        self.room, self.policy = room, policy
        self._fleet, self._wants, self._now = fleet, wants, now
        self.configurations = {configuration.id: configuration for configuration in fleet.configurations}
        self._regrets: dict[str, float] = {}
        #: Ids of pools that this plan stops.
        self.stopped: set[str] = set()
        #: Pools that are not stopped to make room: as many of a configuration as it keeps up.
        self._kept = self._standing()
        self._backoffs: dict[str, list[Backoff]] = {}
        for backoff in fleet.backoffs:
            if backoff.until > now:
                self._backoffs.setdefault(backoff.configuration, []).append(backoff)
        self._ranks: dict[tuple[str, bool], list[tuple[float, int, str]]] = {}
        #: Bytes that pools of a namespace hold, where that is limited.
        self.used = {name: 0 for name, account in fleet.accounts.items() if account.max_bytes is not None}
        for pool in fleet.pools:
            if pool.namespace in self.used:
                self.used[pool.namespace] += sum(pool.bytes.values())

    def _standing(self) -> set[str]:
        kept = set()
        going = {device.id for device in self._fleet.devices if device.state is DeviceState.DRAINING}
        for configuration in self._fleet.configurations:
            if configuration.min_pools:
                coming = [pool for pool in self.room.coming(configuration.id) if not going & pool.bytes.keys()]
                some = sorted(coming, key=lambda pool: (pool.started, pool.id))
                kept |= {pool.id for pool in some[: configuration.min_pools]}
        return kept

    def backoffs(self, configuration: str) -> list[Backoff]:
        """What keeps it from hosts now."""
        return self._backoffs.get(configuration, [])

    # ---- what stopping a pool costs ----

    def regret(self, pool: Pool) -> float:
        """What the next steps are expected to wait when it is stopped, in weighted seconds."""
        if pool.id in self.stopped or pool.state is PoolState.DRAINING:
            return 0.0
        if (known := self._regrets.get(pool.configuration)) is None:
            known = self._regrets[pool.configuration] = self._missed(pool.configuration)
        return known

    def stop(self, pool: Pool) -> None:
        """From now on it is one that this plan stops; others of its configuration are missed the more."""
        self.stopped.add(pool.id)
        self.forget(pool.configuration)

    def forget(self, configuration: str) -> None:
        """The regret for its pools is another: one more, or one less, serves it."""
        self._regrets.pop(configuration, None)

    def _missed(self, id_: str) -> float:
        configuration = self.configurations.get(id_)
        if configuration is None:
            return 0.0
        want, usage = self._wants.get(id_), self._fleet.usage.get(id_)
        gone = load_of(configuration) + self.policy.recovery
        missed = 0.0
        if usage is not None and usage.rate > 0:
            weight = sum(self.policy.weights[p] * share for p, share in usage.classes.items()) if usage.classes else 1.0
            # The first to come waits for all of the time, those that come meanwhile for half of it.
            missed = weight * self.asked(id_) * gone * (1 + usage.rate * gone / 2)
        if want is not None:
            missed += want.ahead * gone + want.pressure
        beside = sum(pool.id not in self.stopped for pool in self.room.coming(id_)) > 1
        return missed * (self.policy.sibling if beside else 1.0)

    def asked(self, configuration: str) -> float:
        """The probability that it is asked for within the horizon."""
        usage = self._fleet.usage.get(configuration)
        return 1 - math.exp(-usage.rate * self.policy.horizon) if usage else 0.0

    def yields(self, pool: Pool, want: ConfigurationDemand, reclaims: bool) -> bool:
        """Whether it may be stopped for that; with `reclaims`, for bytes that are the other's own."""
        if pool.state is PoolState.DRAINING or pool.id in self.stopped:
            return True
        if self.stays(pool) or (
            not self.policy.lend and self.room.owns(pool) and pool.configuration != want.configuration.id
        ):
            return False
        own = self._wants.get(pool.configuration)
        waits = own is not None and own.steps > 0
        if reclaims or not (pool.busy or waits):
            return True
        if self._is_fresh(pool) or (pool.busy and pool.preemptions >= self.policy.max_preemptions):
            return False
        if want.must:
            return True
        if (own is not None and own.must) or (pool.busy and pool.serving is None):
            return False
        working = NO_RANK if pool.serving is None else pool.serving.rank
        theirs = min(working, NO_RANK if own is None else own.rank)
        if want.rank == theirs:
            return want.pressure >= self.policy.drain_factor * self.regret(pool)
        return want.rank < theirs

    def _is_fresh(self, pool: Pool) -> bool:
        """Whether it has not served for as long as its start must pay for."""
        if pool.loaded is None:
            return True
        return (self._now - pool.loaded).total_seconds() < self.policy.amortise * self._load(pool)

    def _load(self, pool: Pool) -> float:
        configuration = self.configurations.get(pool.configuration)
        return 0.0 if configuration is None else load_of(configuration)

    # ---- options ----

    def options(self, want: ConfigurationDemand, evict: bool, moving: bool = False) -> Iterator[Option]:
        """
        Ways to start a pool for it now: into free bytes, and with `evict` into those of others.

        With `moving`, idle pools that are kept up make room too, if there are free bytes for them elsewhere.
        """
        configuration = want.configuration
        backed_off = {backoff.host for backoff in self.backoffs(configuration.id)}
        fastest = max((layout.tokens_per_second for layout in configuration.layouts), default=1.0)
        for layout in configuration.layouts:
            seen = set()
            for devices in self.room.fitting(configuration, layout, backed_off):
                if self._is_open(configuration, devices, layout, want):
                    seen.add(devices)
                    yield self._option(want, layout, devices, _FREE, fastest)
            if not evict or seen:
                continue
            for devices in self._cheapest(want, layout, backed_off):
                if devices not in seen and self._is_open(configuration, devices, layout, want):
                    cover = self._cover(want, layout, devices, moving)
                    if cover is not None:
                        yield self._option(want, layout, devices, cover, fastest)

    def _is_open(
        self, configuration: Configuration, devices: DeviceSet, layout: Layout, want: ConfigurationDemand
    ) -> bool:
        """Not kept for another, or given back to it in time; and not lent by one who waits for it."""
        for device in devices:
            if any(self._is_claimed(owner, device) for owner in self.room.lenders(device) if owner != configuration.id):
                return False
            if (held := self.room.held.get(device)) is not None and held[0] != configuration.id:
                each = want.work / want.steps if want.steps else math.inf
                if layout.load.total_seconds() + each + self.policy.unload > held[1]:
                    return False
        return True

    def _is_claimed(self, owner: str, device: str) -> bool:
        """Whether steps wait for it and no pool is coming: it lends nothing then, where it may be started."""
        want = self._wants.get(owner)
        return (
            want is not None
            and want.steps > 0
            and all(pool.id in self.stopped for pool in self.room.coming(owner))
            and self.room.devices[device].host not in {backoff.host for backoff in self.backoffs(owner)}
        )

    def _cheapest(self, want: ConfigurationDemand, layout: Layout, backed_off: set[str]) -> Iterator[DeviceSet]:
        """Device sets to look at for victims: all in a small fleet, else those whose pools are missed the least."""
        room, enough = self.room, self.room.enough(layout.type)
        if len(layout.parts) > 1 or len(room.open.get(layout.type, ())) == enough:
            yield from room.sets(want.configuration, layout, backed_off)
            return
        part, found = layout.parts[0], 0
        for _, size, id_ in self._ranked(layout.type, idle=not want.must):
            device = room.devices[id_]
            if size + room.free[id_] >= part and device.host not in backed_off:
                if room.allows(want.configuration, device, part):
                    yield room.with_ram(layout, (id_,))
                    found += 1
                if found >= enough:
                    return

    def _ranked(self, kind: str, idle: bool) -> list[tuple[float, int, str]]:
        """Devices of a type by the regret for each byte of the pools on them, with those bytes."""
        if (known := self._ranks.get((kind, idle))) is None:
            known = []
            for device in self.room.open.get(kind, ()):
                regret, size = 0.0, 0
                for pool in self.room.on[device.id]:
                    if pool.state in _YIELDING and not (idle and pool.busy) and not self.stays(pool):
                        regret += self.regret(pool)
                        size += self.room.offer(pool, device.id)
                if size:
                    known.append((regret / size, size, device.id))
            known.sort()
            self._ranks[kind, idle] = known
        return known

    def _cover(self, want: ConfigurationDemand, layout: Layout, devices: DeviceSet, moving: bool) -> _Cover | None:
        """
        Pools whose bytes fill what is missing; None: there are none.

        Idle ones first, then those that are missed the least for each byte, then those that were used the longest ago.
        """
        offer = self.room.offer
        missing = self.missing(want.configuration, layout, devices)
        reclaims = self.reclaims(want.configuration, layout, devices)
        apart = {pool.id: pool for pool in self.room.shunned(want.configuration, devices)}
        if any(
            p.state not in self._leaves_from(reclaims) or not self.yields(p, want, reclaims) for p in apart.values()
        ):
            return None
        for pool in apart.values():
            for d in missing:
                missing[d] -= offer(pool, d)
        ranked = []
        for pool in self._yielding(devices, reclaims):
            if pool.id in apart:
                continue
            size = sum(min(offer(pool, d), m) for d, m in missing.items() if m > 0)
            if size > 0 and (self.yields(pool, want, reclaims) or (moving and self.may_move(pool))):
                regret = self.regret(pool)
                idle = pool.state is not PoolState.STARTING and not pool.busy
                ranked.append((not idle, regret / size, pool.used, pool.id, regret, pool))
        ranked.sort(key=lambda entry: entry[:4])
        chosen: list[tuple[float, Pool]] = []
        for *_, regret, pool in ranked:
            if any(m > 0 and offer(pool, d) > 0 for d, m in missing.items()):
                chosen.append((regret, pool))
                for d in missing:
                    missing[d] -= offer(pool, d)
        if any(m > 0 for m in missing.values()):
            return None
        for regret, pool in sorted(chosen, key=lambda entry: (-entry[0], entry[1].id)):
            if all(m + offer(pool, d) <= 0 for d, m in missing.items()):  # the others suffice
                chosen.remove((regret, pool))
                for d in missing:
                    missing[d] += offer(pool, d)
        chosen += [(self.regret(pool), pool) for _, pool in sorted(apart.items())]
        victims = tuple(pool for _, pool in chosen)
        kept = [pool for pool in victims if pool.id in self._kept and not reclaims]
        moves = self.relocate(kept, layout.on(devices), victims)
        if moves is None:
            return None
        wait = max((self.ends(pool, want, reclaims) for pool in victims), default=0.0)
        return _Cover(victims, sum(regret for regret, _ in chosen), wait, moves)

    def _yielding(self, devices: DeviceSet, reclaims: bool) -> list[Pool]:
        """Pools on any of them whose bytes can be promised. Who wants its own bytes stops a load for them too."""
        states = self._leaves_from(reclaims)
        pools = {pool.id: pool for device in devices for pool in self.room.on[device] if pool.state in states}
        return list(pools.values())

    @staticmethod
    def _leaves_from(reclaims: bool) -> frozenset[PoolState]:
        return _YIELDING | {PoolState.STARTING} if reclaims else _YIELDING

    def missing(self, configuration: Configuration, layout: Layout, devices: DeviceSet) -> dict[str, int]:
        """Bytes that are not free, by device."""
        parts = layout.on(devices).items()
        return {device: part - self.room.free_for(configuration, device) for device, part in parts}

    def may_hold(self, namespace: str, more: int) -> bool:
        """Whether the pools of a namespace may hold so many bytes more."""
        limit = self._fleet.accounts[namespace].max_bytes if namespace in self.used else None
        return limit is None or self.used[namespace] + more <= limit

    def may_move(self, pool: Pool) -> bool:
        """
        Whether it may be stopped here when it is started elsewhere: nobody uses it, it is not pinned, and its namespace
        may hold it twice for that moment.
        """
        configuration, want = self.configurations.get(pool.configuration), self._wants.get(pool.configuration)
        return (
            pool.state is PoolState.SERVING
            and not pool.busy
            and not pool.pinned
            and pool.id not in self.stopped
            and configuration is not None
            and not configuration.pinned
            and (want is None or not want.steps)
            and self.may_hold(pool.namespace, sum(pool.bytes.values()))
        )

    def relocate(
        self, pools: Sequence[Pool], needs: Mapping[str, int], victims: Sequence[Pool]
    ) -> tuple[tuple[Pool, Option], ...] | None:
        """
        Free bytes for each of them on other devices; None when one finds none.

        Those of the host's RAM may be on the same host, beside what of `needs` the victims do not cover.
        """
        taken = {d: max(need - sum(self.room.offer(v, d) for v in victims), 0) for d, need in needs.items()}
        leaving = set(self.room.computing(needs))
        moves = []
        for pool in sorted(pools, key=lambda p: (-sum(p.bytes.values()), p.id)):
            found = [
                option
                for option in self.options(nothing(self.configurations[pool.configuration]), evict=False)
                if not leaving & set(option.computing)
                and all(self.room.free[d] - taken.get(d, 0) >= size for d, size in option.bytes.items())
            ]
            if not found:
                return None
            best = min(found, key=lambda option: option.order)
            taken |= {device: taken.get(device, 0) + size for device, size in best.bytes.items()}
            moves.append((pool, best))
        return tuple(moves)

    def reclaims(self, configuration: Configuration, layout: Layout, devices: DeviceSet) -> bool:
        """Whether the bytes are set aside for it."""
        return all(self.room.own(d, configuration.id) >= part for d, part in layout.on(devices).items())

    def ends(self, pool: Pool, want: ConfigurationDemand, reclaims: bool) -> float:
        """Seconds until its bytes are back when it is stopped now for that."""
        left = pool.work_left.total_seconds() if pool.busy else 0.0
        return self.policy.unload + (0.0 if self.preempts(pool, want, reclaims) else left)

    def preempts(self, pool: Pool, want: ConfigurationDemand, reclaims: bool) -> bool:
        """Whether its steps are handed back at once, rather than waited for."""
        if not pool.busy or pool.state is PoolState.DRAINING:
            return False
        return pool.work_left.total_seconds() > self.patience(pool, want, reclaims)

    def patience(self, pool: Pool, want: ConfigurationDemand, reclaims: bool) -> float:
        """
        Seconds that the steps in flight of a pool are waited for before they are handed back.

        For bytes that are set aside, as long as they may be lent on; for a higher class the drain limit, unless they
        were handed back too often; else for ever.
        """
        reserve = want.configuration.reserve
        if reclaims and reserve is not None:
            return max(reserve.within.total_seconds() - self.policy.unload, 0.0)
        if pool.serving is None or pool.serving.rank <= want.rank or pool.preemptions >= self.policy.max_preemptions:
            return math.inf
        return self.policy.drain_limit

    def _option(
        self,
        want: ConfigurationDemand,
        layout: Layout,
        devices: DeviceSet,
        cover: _Cover,
        fastest: float,
    ) -> Option:
        victims = cover.victims
        configuration, room = want.configuration, self.room
        computing, first = devices[: len(layout.parts)], room.devices[devices[0]]
        fetch = configuration.files.get(first.host, configuration.fetch or NOTHING).total_seconds()
        estimate = max(cover.wait, fetch) + layout.load.total_seconds()
        stopped = {victim.id for victim in victims}
        beside = sum(
            room.active[d] - sum((d in v.bytes and v.busy > 0) / len(room.computing(v.bytes)) for v in victims)
            for d in computing
        ) / len(computing)
        speed = layout.tokens_per_second * min(room.devices[d].speed for d in computing)
        each = want.work / want.steps if want.steps else 0.0
        slower = each * (fastest / max(speed, 1e-9) * (1 + beside) - 1)
        growth = want.growth or want.ahead
        cost = growth * (estimate + slower) + cover.regret
        lent = sum(room.lent(d, configuration.id) for d in devices)
        left = sum(room.free[d] - part for d, part in zip(devices, layout.parts, strict=False))
        if configuration.packing is Packing.SPREAD:
            own = [p for p in room.coming(configuration.id) if p.id not in stopped]
            near = sum(bool(p.bytes.keys() & set(computing)) for p in own)
            hosts = sum(any(room.devices[d].host == first.host for d in p.bytes if d in room.devices) for p in own)
            apart: tuple[float, ...] = (near, hosts, -left)
        else:
            apart = (0.0, 0.0, left)
        order = (lent > 0, any(v.busy for v in victims), round(cost, 3), *apart, *devices)
        return Option(layout, devices, victims, cover.regret, estimate, order, cover.moves)

    # ---- what keeps it waiting ----

    def soonest(self, want: ConfigurationDemand) -> tuple[float, DeviceSet, tuple[Pool, ...]] | None:
        """
        The device set that pools will leave first, seconds until then, and who is waited for; None: they never need to.

        A pool with work is counted as staying until its start has paid for itself and its steps have ended.
        """
        configuration = want.configuration
        backed_off = {backoff.host for backoff in self.backoffs(configuration.id)}
        best: tuple[float, DeviceSet, tuple[Pool, ...]] | None = None
        for layout in configuration.layouts:
            for devices in islice(self.room.sets(configuration, layout, backed_off), self.policy.max_sets):
                found = self._leaves(want, layout, devices)
                if found is not None and (best is None or (found[0], devices) < best[:2]):
                    best = (found[0], devices, found[1])
        return best

    def _leaves(
        self, want: ConfigurationDemand, layout: Layout, devices: DeviceSet
    ) -> tuple[float, tuple[Pool, ...]] | None:
        missing = self.missing(want.configuration, layout, devices)
        pools = {p.id: p for d in devices for p in self.room.on[d] if not self.stays(p)}
        apart = {pool.id for pool in self.room.shunned(want.configuration, devices)}
        if not apart <= pools.keys():
            return None
        waited = []
        for _, after, _, pool in sorted((p.id not in apart, self._until(p), p.id, p) for p in pools.values()):
            if pool.id not in apart and all(m <= 0 for m in missing.values()):
                break
            waited.append((after, pool))
            for d in missing:
                missing[d] -= self.room.offer(pool, d)
        if any(m > 0 for m in missing.values()):
            return None
        return max((after for after, _ in waited), default=0.0), tuple(pool for _, pool in waited)

    def stays(self, pool: Pool) -> bool:
        """Whether nobody can have its bytes: it is never stopped for others, or nobody knows whether it lives."""
        configuration = self.configurations.get(pool.configuration)
        return (
            pool.pinned
            or pool.id in self._kept
            or pool.state is PoolState.SUSPECT
            or (configuration is not None and configuration.pinned)
        )

    def _until(self, pool: Pool) -> float:
        """Seconds until it can be gone."""
        left = pool.work_left.total_seconds() if pool.busy else 0.0
        if pool.state is PoolState.DRAINING or pool.id in self.stopped:
            return left + self.policy.unload
        load = self._load(pool)
        paid = self.policy.amortise * load
        if pool.loaded is None:
            expected = (pool.expected - self._now).total_seconds() if pool.expected else load
            return max(expected, 0.0) + paid + self.policy.unload
        own = self._wants.get(pool.configuration)
        if pool.busy or (own is not None and own.steps):
            left = max(left, paid - (self._now - pool.loaded).total_seconds())
        return left + self.policy.unload
