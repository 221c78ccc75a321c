"""
Placement: decides which pools are started, stopped and moved, from the cluster and the demand.

The same arguments give the same plan. The ledger accepts everything that is planned: each pool that is started fits
into bytes that are free, or that draining pools promise to it.
Each action, and each refusal of demand, has a reason with figures.

How it decides: `docs/scheduling.md`. The plan is made on a `PlanState`, which this module and `defragmentation` change.

Nothing here reads a clock or a database: the caller passes `now` and applies the plan.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from functools import partial

from app.fleet.host import HostState
from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import PoolState
from app.kernel.priority import Priority
from app.scheduler.planner import reasons
from app.scheduler.planner.candidate import MostRegret, PlacementCandidate, Vacancy
from app.scheduler.planner.cluster import Cluster, Configuration, Pool
from app.scheduler.planner.demand import ModelDemand, WaitingSteps, model_demand, no_demand
from app.scheduler.planner.plan import (
    Action,
    DropReserve,
    GrantReserve,
    MovePool,
    Plan,
    Purpose,
    Refusal,
    StartPool,
    StopMode,
    StopPool,
)
from app.scheduler.planner.policy import PlacementPolicy
from app.scheduler.planner.price import EvictionPrice
from app.scheduler.planner.reasons import RefusalReason
from app.scheduler.planner.search import Search
from app.scheduler.planner.selection import CandidateSelection
from app.scheduler.planner.state import DeviceSet, PlanState


def plan(
    cluster: Cluster, waiting: Sequence[WaitingSteps], now: datetime, policy: PlacementPolicy | None = None
) -> Plan:
    """The pools to start and stop, and the reasons for which no more is done."""
    return Planner(cluster, waiting, now, policy or PlacementPolicy()).plan()


class Planner:
    """Makes one plan."""

    def __init__(
        self, cluster: Cluster, waiting: Sequence[WaitingSteps], now: datetime, policy: PlacementPolicy
    ) -> None:
        self.cluster, self.now, self.policy = cluster, now, policy
        self.configurations = {configuration.id: configuration for configuration in cluster.configurations}
        self.demands = model_demand(cluster.configurations, cluster.accounts, waiting, now, policy)
        self.state = PlanState(cluster, policy)
        self.search = Search(cluster, self.demands, self.state, now, policy)
        self.selection = CandidateSelection(self.search, self.state, policy)
        self.eviction = self.search.eviction
        self.names = reasons.Names(cluster)
        self.actions: list[Action] = []
        self.refusals: dict[str, Refusal] = {}
        self.price = EvictionPrice(self.state, self.eviction, policy)
        self.starts = 0
        self.draining = {id_ for id_, device in self.state.devices.items() if device.state is HostState.DRAINING}

    def plan(self) -> Plan:
        """Make the plan. Called once."""
        self.plan_reserves()
        self.preempt_late_drains()
        self.stop_unneeded()
        for configuration in self.cluster.configurations:
            self.meet_target(configuration)
        waiting = sorted((demand for demand in self.demands.values() if demand.steps), key=self.urgency)
        without_pool = sum(not self.state.pools_of(demand.configuration.id) for demand in waiting)
        self.price.threshold *= 1 + self.policy.crowding * max(without_pool - 1, 0)
        for demand in waiting:
            self.serve(demand)
        for demand in waiting:
            id_ = demand.configuration.id
            if not self.state.count_coming(id_) and id_ not in self.refusals:
                self.refuse_for_now(demand)  # its pool was stopped for another demand
        upcoming = (demand for demand in self.demands.values() if not demand.steps and demand.upcoming > 0)
        for demand in sorted(upcoming, key=lambda demand: (-demand.upcoming, demand.configuration.id)):
            self.start_ahead(demand)
        for configuration in self.cluster.configurations:
            self.start_expected(configuration)
        for demand in self.demands.values():
            if demand.exhausted and not demand.steps:
                self.refuse(demand, reasons.exhausted(demand, self.cluster.accounts, self.now))
        return Plan(tuple(self.actions), tuple(self.refusals.values()))

    @staticmethod
    def urgency(demand: ModelDemand) -> tuple[object, ...]:
        """Overdue first, then due, then by class, then by the pressure that a second of loading removes."""
        by_load = demand.pressure / max(demand.load, 0.1)
        return (not demand.overdue, not demand.due, demand.rank, -by_load, demand.configuration.id)

    # ---- reserves ----

    def plan_reserves(self) -> None:
        """Drop the reserves that are not needed or of no use, and grant those that are missing."""
        kept: dict[str, int] = {}
        for reserve in self.cluster.reserves:
            reason = self.reason_to_drop(reserve, kept.get(reserve.configuration, 0))
            if reason is not None:
                self.actions.append(DropReserve(reserve.id, reason))
                self.state.drop_reserve(reserve)
            else:
                kept[reserve.configuration] = kept.get(reserve.configuration, 0) + 1
        for configuration in self.cluster.configurations:
            if configuration.reserve is None:
                continue
            for _ in range(configuration.reserve.pools - kept.get(configuration.id, 0)):
                if (bytes_ := self.place_reserve(configuration)) is None:
                    self.refuse_reserve(configuration)
                    break
                self.state.add_reserve(configuration.id, bytes_)
                self.actions.append(
                    GrantReserve(configuration.id, bytes_, reasons.reserve_granted(configuration, bytes_, self.names))
                )

    def reason_to_drop(self, reserve: ReservedCapacity, others: int) -> str | None:
        """Why a reserve is dropped, or None; `others` is the number of reserves that its configuration keeps."""
        configuration = self.configurations.get(reserve.configuration)
        wanted = configuration.reserve.pools if configuration and configuration.reserve else 0
        if configuration is None or others >= wanted:
            return reasons.reserve_dropped(wanted)
        if self.draining & reserve.bytes.keys():
            return reasons.drained(reserve.bytes, self.names)
        if not configuration.layouts or any(self.state.fits_reserve(reserve, one) for one in configuration.layouts):
            return None
        return reasons.reserve_outgrown(configuration, reserve.bytes.values())

    def place_reserve(self, configuration: Configuration) -> dict[str, int] | None:
        """The bytes of a new reserve, where the fewest bytes of others must go; None when it fits nowhere."""
        best: tuple[tuple[int, int, DeviceSet], dict[str, int]] | None = None
        state = self.state
        for layout in configuration.layouts:
            for devices in self.search.sets.possible(configuration, layout, ()):
                parts = layout.on(devices)
                left = [state.usable[d] - state.non_preemptible[d] - part for d, part in parts.items()]
                if min(left) >= 0:
                    taken = sum(max(part - state.free[d], 0) for d, part in parts.items())
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

    # ---- stopping pools ----

    def preempt_late_drains(self) -> None:
        """Preempt the steps of pools that drain for longer than the grace period of those that wait for their bytes."""
        if not (backed := [pool for pool in self.cluster.pools if pool.backing]):
            return
        pools = {pool.id: pool for pool in self.cluster.pools}
        for waiting in backed:
            configuration = self.configurations.get(waiting.configuration)
            if configuration is None:
                continue
            demand = self.demands.get(configuration.id) or no_demand(configuration)
            reclaims = self.state.is_within_reserve(waiting)
            for id_ in sorted(waiting.backing.keys() & pools.keys()):
                if self.is_late(pools[id_], demand, reclaims):
                    reason = reasons.preempted(pools[id_], demand, reclaims)
                    self.stop(pools[id_], StopMode.PREEMPT, reason, configuration.id)

    def is_late(self, pool: Pool, demand: ModelDemand, reclaims: bool) -> bool:
        """Whether a drain exceeds the grace period, and its steps are not preempted yet."""
        if pool.stopping is None or pool.preempting or not pool.busy or pool.id in self.state.stopped:
            return False
        return (self.now - pool.stopping).total_seconds() >= self.eviction.grace_period(pool, demand, reclaims)

    def stop_unneeded(self) -> None:
        """Stop pools that are idle for long, grants that no step waits for, and pools on devices that are drained."""
        if self.draining:
            pools = list(self.cluster.pools)
        else:  # most pools of a large cluster work, or are of a model with demand
            wanted = {id_ for id_, demand in self.demands.items() if demand.steps or demand.upcoming}
            pools = [one for one in self.cluster.pools if not one.busy and one.configuration not in wanted]
        for pool in sorted(pools, key=lambda one: one.id):
            configuration = self.configurations.get(pool.configuration)
            if pool.state is PoolState.DRAINING or pool.state is PoolState.SUSPECT:
                continue
            if self.draining and self.draining & pool.bytes.keys():
                self.evacuate(pool, configuration)
            elif configuration is not None and not self.eviction.is_protected(pool):
                self.stop_if_idle(pool, configuration)

    def stop_if_idle(self, pool: Pool, configuration: Configuration) -> None:
        demand = self.demands.get(configuration.id)
        if pool.busy or (demand is not None and (demand.steps or demand.upcoming)):
            return
        is_wanted = configuration.requested or self.eviction.is_expected(configuration)
        if pool.state is PoolState.WAITING and not is_wanted:
            self.stop(pool, StopMode.DRAIN, reasons.NO_DEMAND)
        if pool.state is not PoolState.SERVING:
            return
        idle = self.now - pool.used
        if configuration.keep_alive is not None and idle >= configuration.keep_alive:
            self.stop(pool, StopMode.DRAIN, reasons.idle(idle, configuration.keep_alive))
        elif self.state.count_coming(configuration.id) > 1 and idle.total_seconds() >= self.policy.replica_keep_alive:
            self.stop(pool, StopMode.DRAIN, reasons.idle_replica(idle))

    def evacuate(self, pool: Pool, configuration: Configuration | None) -> None:
        """Stop a pool on a device that is drained; if it is in use, start another of its model in free bytes."""
        self.stop(pool, StopMode.DRAIN, reasons.drained(pool.bytes, self.names))
        if configuration is None or (not pool.busy and configuration.id not in self.demands):
            return
        demand = no_demand(configuration)
        candidate = self.free_place(configuration)
        if candidate is not None and self.state.may_hold(pool.namespace, candidate.total_bytes):
            self.start(demand, candidate, Purpose.EVACUATION, reasons.evacuated(candidate, self.names), pool.namespace)

    def free_place(self, configuration: Configuration) -> PlacementCandidate | None:
        """The best candidate in free bytes for a pool for which no step waits."""
        return min(self.search.free_places(configuration), key=lambda one: one.order, default=None)

    def stop(self, pool: Pool, mode: StopMode, reason: str, room_for: str = "") -> None:
        self.state.stop(pool)
        self.actions.append(StopPool(pool.id, mode, reason, room_for))

    # ---- starting pools ----

    def meet_target(self, configuration: Configuration) -> None:
        """Start the pools that a target or a start command asks for, at the cost of pools that are not in use."""
        count = max(configuration.min_pools, configuration.requested)
        for _ in range(count - self.state.count_coming(configuration.id)):
            demand = self.demands.get(configuration.id) or no_demand(configuration)
            found = self.search.candidates(demand, evict=True)
            unused = (one for one in found if not any(map(self.eviction.is_used, one.victims)))
            best = min(unused, key=lambda one: one.order, default=None)
            if best is None:
                if not demand.steps:  # `serve` does more for waiting steps
                    self.refuse_for_now(demand)
                return
            if not self.start(demand, best, Purpose.TARGET, reasons.target(configuration, best, self.names)):
                return

    def serve(self, demand: ModelDemand) -> None:
        """Start a pool for waiting steps, if they need one and their pressure is high enough."""
        coming = self.state.coming(demand.configuration.id)
        if coming:
            if not self.needs_replica(demand, coming):
                return
            demand = demand.for_replica(self.policy)
        if self.starts >= self.policy.max_starts:
            if not coming:
                self.refuse(demand, reasons.next_plan(self.starts, demand))
            return
        best, nearest = self.choose(demand, idle_only=bool(coming) and demand.rank == Priority.BATCH.rank)
        if best is None and not coming and demand.configuration.reserve is not None:
            self.withdraw_grants(demand.configuration)
        if best is not None:
            purpose = Purpose.REPLICA if coming else Purpose.DEMAND
            self.start(demand, best, purpose, reasons.started(demand, best, coming, self.names))
        elif not coming:
            self.refuse_for_now(demand, nearest)

    def withdraw_grants(self, owner: Configuration) -> None:
        """Withdraw grants that wait for bytes of the owner's reserve: the next plan gives those to the owner."""
        for pool in self.cluster.pools:
            lent = any(self.state.own_reserve(device, owner.id) for device in pool.bytes)
            is_borrower = pool.state is PoolState.WAITING and lent and pool.configuration != owner.id
            if is_borrower and pool.id not in self.state.stopped and not self.eviction.is_protected(pool):
                self.stop(pool, StopMode.DRAIN, reasons.withdrawn(owner), owner.id)

    def needs_replica(self, demand: ModelDemand, coming: Collection[Pool]) -> bool:
        """Whether the queue is long enough for another pool."""
        slots = sum(pool.slots for pool in coming)
        return (
            len(coming) < demand.configuration.max_pools
            and demand.steps > slots
            and demand.work / slots > self.policy.replica_factor * demand.load
        )

    def choose(
        self, demand: ModelDemand, *, idle_only: bool = False
    ) -> tuple[PlacementCandidate | None, PlacementCandidate | None]:
        """
        The best candidate for which the pressure is high enough, and the cheapest for which it is not.

        With `idle_only` only those count whose devices no other pool computes on.
        """
        if idle_only:
            found = (one for one in self.search.candidates(demand, evict=True) if self.is_idle(one))
            return min(found, key=lambda one: one.order, default=None), None
        price = self.price
        best, nearest = self.selection.select(demand, partial(price.is_worth, demand), price.most_regret(demand))
        if best is None and self.policy.migrate and (nearest is None or price.is_reached(demand, nearest)):
            is_put_off = nearest is not None
            for candidate in self.search.candidates(demand, evict=True, moving=True):
                if price.is_worth(demand, candidate):
                    if best is None or candidate.order < best.order:
                        best = candidate
                elif is_put_off:
                    continue
                elif nearest is None or (candidate.regret, candidate.devices) < (nearest.regret, nearest.devices):
                    nearest = candidate
        if best is not None and best.victims and price.reclaims(demand, best):
            best = self.elsewhere(demand, best)
        return best, nearest

    def elsewhere(self, demand: ModelDemand, reclaiming: PlacementCandidate) -> PlacementCandidate:
        """The best candidate that is cheaper than to take back lent bytes; else those."""
        is_cheaper = partial(self.price.is_cheaper, demand, reclaiming=reclaiming)
        most_regret = MostRegret(reclaiming.regret, used=-math.inf)
        return self.selection.select(demand, is_cheaper, most_regret)[0] or reclaiming

    def is_idle(self, candidate: PlacementCandidate) -> bool:
        """Whether no pool is, or will be, on the devices on which it computes: another one there would be slowed."""
        state = self.state
        return not candidate.victims and not any(
            pool.id not in state.stopped for device in candidate.computing for pool in state.pools_on[device]
        )

    def start_ahead(self, demand: ModelDemand) -> None:
        """Start a pool for steps that will soon be ready, if that saves them more than it costs others."""
        if self.state.count_coming(demand.configuration.id) or demand.upcoming_in > demand.load + self.policy.unload:
            return
        best: PlacementCandidate | None = None
        for one in self.search.candidates(demand, evict=True):
            gains = demand.upcoming * demand.load >= one.regret and not any(map(self.eviction.is_used, one.victims))
            if gains and (best is None or one.order < best.order):
                best = one
        if best is not None and self.starts < self.policy.max_starts:
            self.start(demand, best, Purpose.LOOK_AHEAD, reasons.prepared(demand, best, self.names))

    def start_expected(self, configuration: Configuration) -> None:
        """
        Start a pool for a model that is requested with regularity, when its next arrival is near.

        It begins when the shortest of the gaps would end before the pool serves, if most of them end soon after. It
        costs no pool in use, no more regret than it saves, and waits while others load on the host.
        """
        pattern = self.eviction.pattern(configuration)
        if pattern is None or configuration.id in self.demands or self.state.count_coming(configuration.id):
            return
        demand = no_demand(configuration)
        begin = demand.load + self.policy.unload
        share = pattern.share(self.now, begin + self.policy.spread)
        if not pattern.share(self.now, begin) or share < self.policy.likely or self.starts >= self.policy.max_starts:
            return
        gain = share * self.policy.weights[pattern.priority] * demand.load
        best: PlacementCandidate | None = None
        for one in self.search.candidates(demand, evict=True):
            host = self.state.devices[one.devices[0]].host
            is_cheap = gain >= one.regret and not any(map(self.eviction.is_used, one.victims))
            gains = is_cheap and not self.state.loads[host]
            if gains and (best is None or one.order < best.order):
                best = one
        if best is not None:
            self.start(demand, best, Purpose.EXPECTED, reasons.expected(pattern, self.now, best, self.names))

    def start(
        self,
        demand: ModelDemand,
        candidate: PlacementCandidate,
        purpose: Purpose,
        reason: str,
        namespace: str | None = None,
    ) -> bool:
        """Start a pool and stop its victims; returns False when no namespace may hold the bytes."""
        configuration = demand.configuration
        if namespace is None:
            namespace = self.charged_namespace(demand, candidate.total_bytes)
            if namespace is None:
                held = self.state.held_bytes
                self.refuse(demand, reasons.beyond_bytes(demand, candidate, self.cluster.accounts, held))
                return False
        estimate = timedelta(seconds=candidate.estimate)
        reclaims = self.state.reclaims(configuration, candidate.layout, candidate.devices)
        preempted = {one.id for one in candidate.victims if self.eviction.preempts(one, demand, reclaims)}
        pinned = configuration.pinned and self.state.keeps_next(configuration)
        self.state.start(configuration, candidate.bytes, candidate.victims, self.now + estimate, namespace)
        targets = {pool.id: target for pool, target in candidate.moves}
        for victim in sorted(candidate.victims, key=lambda pool: (pool.id not in targets, pool.id)):
            if victim.state is not PoolState.DRAINING and victim.id not in self.state.stopped:
                mode = StopMode.PREEMPT if victim.id in preempted else StopMode.DRAIN
                self.evict(victim, demand, mode, targets.get(victim.id))
        self.starts += 1
        after = frozenset(victim.id for victim in candidate.victims)
        self.actions.append(
            StartPool(configuration.id, candidate.bytes, purpose, reason, estimate, after, namespace, pinned)
        )
        return True

    def evict(self, victim: Pool, demand: ModelDemand, mode: StopMode, target: PlacementCandidate | None) -> None:
        """Stop a victim; or move it to its target, or into free bytes if its model is likely to be requested soon."""
        reason = reasons.makes_room(victim, demand, self.eviction.regret(victim))
        configuration = self.configurations.get(victim.configuration)
        if target is None and self.policy.migrate and configuration is not None and self.eviction.may_move(victim):
            likely = self.eviction.request_probability(configuration) >= self.policy.likely
            target = self.free_place(configuration) if likely else None
        if target is None:
            self.stop(victim, mode, reason, demand.configuration.id)
        else:
            self.move(victim, target, reasons.moved(reason, target, self.names))

    def move(self, pool: Pool, target: PlacementCandidate, reason: str) -> None:
        self.state.stop(pool)
        estimate = timedelta(seconds=target.estimate)
        configuration = self.configurations[pool.configuration]
        self.state.start(configuration, target.bytes, (), self.now + estimate, pool.namespace)
        self.actions.append(MovePool(pool.id, target.bytes, reason, estimate))

    def charged_namespace(self, demand: ModelDemand, size: int) -> str | None:
        """The namespace with the highest pressure that may hold so many bytes more; None when none may."""
        ranked = sorted(demand.namespaces, key=lambda name: (-demand.namespaces[name], name))
        return next((name for name in ranked if self.state.may_hold(name, size)), None if ranked else "")

    # ---- refusals ----

    def refuse(self, demand: ModelDemand, why: RefusalReason) -> None:
        configuration = demand.configuration
        estimate = None if why.estimate is None else timedelta(seconds=why.estimate)
        refusal = Refusal(configuration.id, configuration.model, why.text, reasons.smallest(configuration), estimate)
        self.refusals.setdefault(configuration.id, refusal)

    def refuse_for_now(self, demand: ModelDemand, nearest: PlacementCandidate | None = None) -> None:
        """Refuse demand that the plan does not serve. For overdue demand, keep the device set that is free first."""
        vacancy = self.search.soonest_vacancy(demand) if nearest is None else None
        if vacancy is not None and demand.overdue:
            self.state.nominate(vacancy.devices, demand.configuration.id, vacancy.seconds)
        self.refuse(demand, self.explain(demand, nearest, vacancy))

    def explain(
        self, demand: ModelDemand, nearest: PlacementCandidate | None, vacancy: Vacancy | None
    ) -> RefusalReason:
        """Why the plan does not serve the demand. Changes nothing."""
        if nearest is not None:
            price, drain_wait = self.price.price(demand, nearest), self.price.drain_wait(demand, nearest)
            return reasons.not_worth(demand, nearest, price, drain_wait, self.names, self.state)
        if vacancy is not None:
            return reasons.blocked(demand, vacancy, self.names, self.state)
        backoffs = self.search.backoffs(demand.configuration.id)
        return reasons.never(demand.configuration, self.search.sets, self.state, backoffs, self.now)
