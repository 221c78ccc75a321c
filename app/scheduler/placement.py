"""
Placement: which pools are started, stopped and waited for, given the fleet and what is waited for.

The same arguments give the same plan. Nothing is planned that the ledger would have to refuse: every pool that is
started fits into bytes that are free, or promised to it by pools that drain.
Everything that a plan does, and everything that it does not do for steps that wait, carries a reason with figures.

How it decides: `docs/scheduling.md`. What it knows of waiting is in `pressure`, of bytes in `room`, of places and of
what pools are worth in `search`, of texts in `reasons`.

Nothing here reads a clock or a database: the caller passes `now` and applies the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import PoolState
from app.scheduler import pressure, reasons
from app.scheduler.cluster import Cluster, Configuration, Demand, DeviceState, Pool
from app.scheduler.option import Option
from app.scheduler.policy import PlacementPolicy
from app.scheduler.pressure import ConfigurationDemand
from app.scheduler.room import DeviceSet, Room
from app.scheduler.search import Search


class Purpose(StrEnum):
    """Why a pool is started."""

    #: Steps wait, and no pool serves them.
    DEMAND = "demand"
    #: Steps wait, and the pools that there are do not suffice.
    REPLICA = "replica"
    #: Steps will soon be ready.
    LOOK_AHEAD = "look_ahead"
    #: Its entry keeps so many pools up.
    TARGET = "target"
    #: A pool on a device that is drained is replaced.
    EVACUATION = "evacuation"


class StopMode(StrEnum):
    """How a pool is stopped. It takes no new work in either way."""

    #: What it works on ends first.
    DRAIN = "drain"
    #: What it works on is handed back at the next token, and tried again elsewhere.
    PREEMPT = "preempt"


@dataclass(frozen=True, slots=True)
class StartPool:
    """Grant the bytes and start a pool; first wait until the pools `after` are gone."""

    configuration: str
    #: By id of the device. The pools `after` cover what is not free.
    bytes: Mapping[str, int]
    purpose: Purpose
    reason: str
    #: Until it is expected to serve.
    estimate: timedelta
    #: Ids of pools that the same plan stops, or that are draining already.
    after: frozenset[str] = frozenset()
    #: On whose behalf.
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class StopPool:
    """Stop a pool."""

    pool: str
    how: StopMode
    reason: str
    #: Id of the configuration that gets its bytes; empty when nobody in particular does.
    room_for: str = ""


@dataclass(frozen=True, slots=True)
class MovePool:
    """Stop an idle pool and start its like on other devices, whose bytes are free."""

    pool: str
    #: By id of the device.
    bytes: Mapping[str, int]
    reason: str
    #: Until the pool serves again.
    estimate: timedelta


@dataclass(frozen=True, slots=True)
class GrantReserve:
    """Set bytes aside for a configuration."""

    configuration: str
    bytes: Mapping[str, int]
    reason: str


@dataclass(frozen=True, slots=True)
class DropReserve:
    """Give a reserve back that is not asked for any more."""

    reserve: str
    reason: str


Action = StartPool | StopPool | MovePool | GrantReserve | DropReserve


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing was done for a configuration that is asked for."""

    configuration: str
    model: str
    #: With figures: what it needs, what there is, what must happen.
    reason: str
    #: Bytes of the smallest layout.
    needs_bytes: int
    #: Until it is expected to serve; None when that takes more than the passing of time.
    estimate: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, in order, and what is not done."""

    actions: tuple[Action, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def plan(fleet: Cluster, demand: Sequence[Demand], now: datetime, policy: PlacementPolicy | None = None) -> Plan:
    """What to start and stop, and why not more."""
    return _Planner(fleet, demand, now, policy or PlacementPolicy()).plan()


class _Planner:
    def __init__(self, fleet: Cluster, demand: Sequence[Demand], now: datetime, policy: PlacementPolicy) -> None:
        self.fleet, self.now, self.policy = fleet, now, policy
        self.of = {configuration.id: configuration for configuration in fleet.configurations}
        self.wants = pressure.wants(self.of, fleet.accounts, demand, now, policy)
        self.room = Room(fleet, policy)
        self.search = Search(fleet, self.wants, self.room, now, policy)
        self.names = reasons.Names(fleet)
        self.actions: list[Action] = []
        self.refusals: dict[str, Refusal] = {}
        self.threshold = policy.threshold
        self.starts = 0
        self.used = self.search.used

    def plan(self) -> Plan:
        self.plan_reserves()
        self.hand_back()
        self.retire()
        for configuration in self.fleet.configurations:
            self.keep_up(configuration)
        waiting = sorted((want for want in self.wants.values() if want.steps), key=self.urgency)
        alone = sum(not self.room.coming(want.configuration.id) for want in waiting)
        self.threshold *= 1 + self.policy.crowding * max(alone - 1, 0)
        for want in waiting:
            self.serve(want)
        for want in waiting:
            if not self.coming(want.configuration.id) and want.configuration.id not in self.refusals:
                self.refuse(want, self.why_not(want, None))  # its pool was stopped for a want after it
        coming = (want for want in self.wants.values() if not want.steps and want.ahead > 0)
        for want in sorted(coming, key=lambda want: (-want.ahead, want.configuration.id)):
            self.prepare(want)
        for want in self.wants.values():
            if want.exhausted and not want.steps:
                self.refuse(want, reasons.exhausted(want, self.fleet.accounts, self.now))
        return Plan(tuple(self.actions), tuple(self.refusals.values()))

    @staticmethod
    def urgency(want: ConfigurationDemand) -> tuple[object, ...]:
        """Beyond the bound, then due, then by class, then by what a second of loading gains."""
        return (not want.must, not want.due, want.rank, -want.pressure / max(want.load, 0.1), want.configuration.id)

    # ---- reserves ----

    def plan_reserves(self) -> None:
        """Give a reserve to who asks for one, and take it from who does not any more, or from where it is of no use."""
        held: dict[str, list[ReservedCapacity]] = {}
        for reserve in self.fleet.reserves:
            if (why := self.useless(reserve, len(held.get(reserve.configuration, ())))) is not None:
                self.actions.append(DropReserve(reserve.id, why))
                self.room.give_back(reserve)
            else:
                held.setdefault(reserve.configuration, []).append(reserve)
        for configuration in self.fleet.configurations:
            if configuration.reserve is None:
                continue
            for _ in range(configuration.reserve.pools - len(held.get(configuration.id, ()))):
                if (bytes_ := self.place_reserve(configuration)) is None:
                    self.refuse_reserve(configuration)
                    break
                self.room.add_reserve(configuration.id, bytes_)
                self.actions.append(
                    GrantReserve(configuration.id, bytes_, reasons.reserve_granted(configuration, bytes_, self.names))
                )

    def useless(self, reserve: ReservedCapacity, before: int) -> str | None:
        """Why its owner has nothing of it; `before` are others that it keeps."""
        configuration = self.of.get(reserve.configuration)
        asked = configuration.reserve.pools if configuration and configuration.reserve else 0
        if configuration is None or before >= asked:
            return reasons.reserve_dropped(asked)
        if self.drained() & reserve.bytes.keys():
            return reasons.drained(reserve.bytes, self.names)
        if not configuration.layouts or any(self.room.holds(reserve, layout) for layout in configuration.layouts):
            return None
        return reasons.reserve_outgrown(configuration, reserve.bytes.values())

    def place_reserve(self, configuration: Configuration) -> dict[str, int] | None:
        best: tuple[tuple[int, int, DeviceSet], dict[str, int]] | None = None
        for layout in configuration.layouts:
            for devices in self.room.sets(configuration, layout, ()):
                parts = layout.on(devices)
                left = [self.room.usable(d) - self.room.non_preemptible[d] - part for d, part in parts.items()]
                if min(left) >= 0:
                    taken = sum(max(part - self.room.free[d], 0) for d, part in parts.items())
                    key = (taken, sum(left), devices)
                    if best is None or key < best[0]:
                        best = key, parts
            if best is not None:
                return best[1]
        return None

    def refuse_reserve(self, configuration: Configuration) -> None:
        needs = reasons.smallest(configuration)
        refusal = Refusal(configuration.id, configuration.model, reasons.no_reserve(needs), needs)
        self.refusals.setdefault(configuration.id, refusal)

    # ---- what drains for too long ----

    def hand_back(self) -> None:
        """Hand back the steps of pools that drain for longer than those that wait for their bytes have to."""
        pools = {pool.id: pool for pool in self.fleet.pools}
        for waiting in self.fleet.pools:
            configuration = self.of.get(waiting.configuration)
            if not waiting.backing or configuration is None:
                continue
            want = self.wants.get(configuration.id) or pressure.nothing(configuration)
            reclaims = self.room.is_within_reserve(waiting)
            for id_ in sorted(waiting.backing.keys() & pools.keys()):
                if self.is_late(pools[id_], want, reclaims):
                    self.stop(
                        pools[id_], StopMode.PREEMPT, reasons.hands_back(pools[id_], want, reclaims), configuration.id
                    )

    def is_late(self, pool: Pool, want: ConfigurationDemand, reclaims: bool) -> bool:
        """Whether it drains for longer than the want has patience, and nothing was done about it."""
        if pool.stopping is None or pool.handing_back or not pool.busy or pool.id in self.search.stopped:
            return False
        return (self.now - pool.stopping).total_seconds() >= self.search.patience(pool, want, reclaims)

    # ---- stopping what nobody needs ----

    def retire(self) -> None:
        """Stop what is idle for long, what nobody waits for any more, and what lies on a device that is drained."""
        going = self.drained()
        for pool in sorted(self.fleet.pools, key=lambda one: one.id):
            configuration = self.of.get(pool.configuration)
            if pool.state in {PoolState.DRAINING, PoolState.SUSPECT}:
                continue
            if going & pool.bytes.keys():
                self.evacuate(pool, configuration)
            elif configuration is not None and not pool.pinned and not self.search.stays(pool):
                self.retire_idle(pool, configuration)

    def drained(self) -> set[str]:
        return {id_ for id_, device in self.room.devices.items() if device.state is DeviceState.DRAINING}

    def retire_idle(self, pool: Pool, configuration: Configuration) -> None:
        want = self.wants.get(configuration.id)
        if pool.busy or (want is not None and (want.steps or want.ahead)):
            return
        if pool.state is PoolState.WAITING and not configuration.ordered:
            self.stop(pool, StopMode.DRAIN, reasons.NOBODY_WAITS)
        if pool.state is not PoolState.SERVING:
            return
        idle = self.now - pool.used
        beside = len([p for p in self.room.coming(configuration.id) if p.id not in self.search.stopped]) > 1
        if configuration.keep_alive is not None and idle >= configuration.keep_alive:
            self.stop(pool, StopMode.DRAIN, reasons.idle(idle, configuration.keep_alive))
        elif beside and idle.total_seconds() >= self.policy.replica_keep_alive:
            self.stop(pool, StopMode.DRAIN, reasons.idle_replica(idle))

    def evacuate(self, pool: Pool, configuration: Configuration | None) -> None:
        """Stop it, and if it is in use start its like elsewhere in free bytes."""
        self.stop(pool, StopMode.DRAIN, reasons.drained(pool.bytes, self.names))
        if configuration is None or (not pool.busy and configuration.id not in self.wants):
            return
        want = pressure.nothing(configuration)
        option = self.free_place(want)
        if option is not None and self.search.may_hold(pool.namespace, option.layout.total_bytes):
            self.start(want, option, Purpose.EVACUATION, reasons.evacuated(option, self.names), pool.namespace)

    def free_place(self, want: ConfigurationDemand) -> Option | None:
        return min(self.search.options(want, evict=False), key=lambda option: option.order, default=None)

    def stop(self, pool: Pool, how: StopMode, reason: str, room_for: str = "") -> None:
        self.search.stop(pool)
        self.actions.append(StopPool(pool.id, how, reason, room_for))

    # ---- starting what somebody waits for ----

    def coming(self, configuration: str) -> list[Pool]:
        return [pool for pool in self.room.coming(configuration) if pool.id not in self.search.stopped]

    def keep_up(self, configuration: Configuration) -> None:
        """Start as many pools as the entry keeps up whatever the demand, or an operator ordered."""
        count = max(configuration.min_pools, configuration.ordered)
        for _ in range(count - len(self.coming(configuration.id))):
            want = self.wants.get(configuration.id) or pressure.nothing(configuration)
            options = (o for o in self.search.options(want, evict=True) if not any(map(self.is_used, o.victims)))
            option = min(options, key=lambda o: o.order, default=None)
            if option is None:
                if not want.steps:  # for those who wait, more is done
                    self.refuse(want, self.why_not(want, None))
                return
            reason = reasons.target(configuration, option, self.names)
            if not self.start(want, option, Purpose.TARGET, reason):
                return

    def serve(self, want: ConfigurationDemand) -> None:
        """Start a pool for it, if it needs one and that is worth it now."""
        coming = self.coming(want.configuration.id)
        if coming and not self.needs_another(want, coming):
            return
        if self.starts >= self.policy.max_starts:
            if not coming:
                self.refuse(want, (reasons.next_plan(self.starts), want.load))
            return
        best, nearest = self.choose(want)
        if best is None and not coming and want.configuration.reserve is not None:
            self.recall(want.configuration)
        if best is not None:
            purpose = Purpose.REPLICA if coming else Purpose.DEMAND
            self.start(want, best, purpose, reasons.started(want, best, coming, self.names))
        elif not coming:
            self.refuse(want, self.why_not(want, nearest))

    def recall(self, owner: Configuration) -> None:
        """Take grants back that wait for lent bytes, so that the next plan can give those to their owner."""
        for pool in self.fleet.pools:
            lent = any(self.room.own(device, owner.id) for device in pool.bytes)
            is_borrower = pool.state is PoolState.WAITING and lent and pool.configuration != owner.id
            if is_borrower and pool.id not in self.search.stopped and not self.search.stays(pool):
                self.stop(pool, StopMode.DRAIN, reasons.recalled(owner), owner.id)

    def needs_another(self, want: ConfigurationDemand, coming: Sequence[Pool]) -> bool:
        slots = sum(pool.slots for pool in coming)
        return (
            len(coming) < want.configuration.max_pools
            and want.steps > slots
            and want.work / slots > self.policy.replica_factor * want.load
        )

    def choose(self, want: ConfigurationDemand) -> tuple[Option | None, Option | None]:
        """The best option that is worth its regret, and the one that comes nearest to it."""
        best: Option | None = None
        nearest: Option | None = None
        options = list(self.search.options(want, evict=True))
        if not options and self.policy.migrate:
            options = list(self.search.options(want, evict=True, moving=True))
        for option in options:
            if self.is_worth(want, option):
                if best is None or option.order < best.order:
                    best = option
            elif nearest is None or (option.regret, option.devices) < (nearest.regret, nearest.devices):
                nearest = option
        return best, nearest

    def is_worth(self, want: ConfigurationDemand, option: Option) -> bool:
        if not option.victims or want.must or self.search.reclaims(want.configuration, option.layout, option.devices):
            return True
        return want.pressure >= self.price(want, option)

    def price(self, want: ConfigurationDemand, option: Option) -> float:
        """Weighted seconds that its steps wait before the victims are stopped."""
        return option.regret * self.threshold * (self.policy.due if want.due else 1.0)

    def prepare(self, want: ConfigurationDemand) -> None:
        """Start a pool for steps that will soon be ready, if that saves them more than it costs others."""
        if self.coming(want.configuration.id) or want.soon > want.load + self.policy.unload:
            return
        best: Option | None = None
        for option in self.search.options(want, evict=True):
            gains = want.ahead * want.load >= option.regret and not any(map(self.is_used, option.victims))
            if gains and (best is None or option.order < best.order):
                best = option
        if best is not None and self.starts < self.policy.max_starts:
            self.start(want, best, Purpose.LOOK_AHEAD, reasons.prepared(want, best, self.names))

    def is_used(self, pool: Pool) -> bool:
        """Whether it works, or would if it was not stopped."""
        own = self.wants.get(pool.configuration)
        stays = pool.state is not PoolState.DRAINING and pool.id not in self.search.stopped
        return pool.busy > 0 or (stays and own is not None and own.steps > 0)

    def start(
        self, want: ConfigurationDemand, option: Option, purpose: Purpose, reason: str, namespace: str | None = None
    ) -> bool:
        """Plan it, unless that would take a namespace beyond its bytes."""
        configuration = want.configuration
        if namespace is None:
            namespace = self.on_behalf_of(want, option.layout.total_bytes)
            if namespace is None:
                self.refuse(want, reasons.beyond_bytes(want, option, self.fleet.accounts, self.used))
                return False
        if namespace in self.used:
            self.used[namespace] += option.layout.total_bytes
        estimate = timedelta(seconds=option.estimate)
        reclaims = self.search.reclaims(configuration, option.layout, option.devices)
        handed_back = {victim.id for victim in option.victims if self.search.preempts(victim, want, reclaims)}
        self.room.take(configuration, option.bytes, option.victims, self.now + estimate)
        self.search.forget(configuration.id)
        targets = {pool.id: target for pool, target in option.moves}
        for victim in sorted(option.victims, key=lambda pool: (pool.id not in targets, pool.id)):
            if victim.state is not PoolState.DRAINING and victim.id not in self.search.stopped:
                how = StopMode.PREEMPT if victim.id in handed_back else StopMode.DRAIN
                self.displace(victim, want, how, targets.get(victim.id))
        self.starts += 1
        after = frozenset(victim.id for victim in option.victims)
        self.actions.append(StartPool(configuration.id, option.bytes, purpose, reason, estimate, after, namespace))
        return True

    def displace(self, victim: Pool, want: ConfigurationDemand, how: StopMode, target: Option | None) -> None:
        """Stop it; or move it to its target, or where bytes are free if it is likely to be asked for soon."""
        reason = reasons.makes_room(victim, want, self.search.regret(victim))
        likely = self.search.asked(victim.configuration) >= self.policy.likely
        if target is None and self.policy.migrate and likely and self.search.may_move(victim):
            target = self.free_place(pressure.nothing(self.of[victim.configuration]))
        if target is None:
            self.stop(victim, how, reason, want.configuration.id)
        else:
            self.move(victim, target, reasons.moved(reason, target, self.names))

    def move(self, pool: Pool, target: Option, reason: str) -> None:
        self.search.stop(pool)
        if pool.namespace in self.used:
            self.used[pool.namespace] += target.layout.total_bytes
        estimate = timedelta(seconds=target.estimate)
        self.room.take(self.of[pool.configuration], target.bytes, (), self.now + estimate)
        self.search.forget(pool.configuration)
        self.actions.append(MovePool(pool.id, target.bytes, reason, estimate))

    def on_behalf_of(self, want: ConfigurationDemand, size: int) -> str | None:
        """The namespace that presses most and may hold so much more; None when none may."""
        ranked = sorted(want.namespaces, key=lambda name: (-want.namespaces[name], name))
        return next((name for name in ranked if self.search.may_hold(name, size)), None if ranked else "")

    # ---- saying why not ----

    def refuse(self, want: ConfigurationDemand, why: tuple[str, float | None]) -> None:
        reason, estimate = why
        configuration = want.configuration
        after = None if estimate is None else timedelta(seconds=estimate)
        refusal = Refusal(configuration.id, configuration.model, reason, reasons.smallest(configuration), after)
        self.refusals.setdefault(configuration.id, refusal)

    def why_not(self, want: ConfigurationDemand, nearest: Option | None) -> tuple[str, float | None]:
        """The reason, and seconds until it is expected to serve."""
        if nearest is not None:
            return reasons.not_worth(want, nearest, self.price(want, nearest), self.names, self.room)
        soonest = self.search.soonest(want)
        if soonest is None:
            return reasons.never(want.configuration, self.room, self.search.backoffs(want.configuration.id), self.now)
        after, devices, waited = soonest
        if want.must:
            for device in devices:
                self.room.held.setdefault(device, (want.configuration.id, after))
        return reasons.blocked(want, after, devices, waited, self.names, self.room)
