"""
A fleet in simulated time: requests arrive, pools load, serve, drain and end, and a planner decides.

The planner gets the arguments of production (`Cluster`, `WaitingSteps`, `now`) and returns a `Plan`; grants go through
the production ledger. The planner knows neither how long a request takes nor when the next one comes.
After every change the bytes of live pools are compared with the capacity of each device; after every plan the promises
of the ledger are checked.

What is modelled: pools that work on one device share its speed evenly, and one that is split over several works on each
of them in turn, for its part of the time; a load takes the time of its layout, and longer when others load on its host,
because they share the disk; the bytes
of a stopped pool come back a second later; a preempted request begins again from nothing; devices fail; footprints are
wrong until a pool has measured them.
What is not: the page cache, how a batch slows its slots down, what a split costs in transfers.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from time import process_time

from app.fleet.host import HostState
from app.fleet.ledger import rules
from app.fleet.ledger.reservation import Ledger, ReservationRefused, ReservationRequest, ReservedCapacity
from app.fleet.pool import COMING, PoolState
from app.kernel.priority import Priority
from app.scheduler.planner.cluster import Cluster, Configuration, Pool
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.plan import DropReserve, GrantReserve, MovePool, Plan, StartPool, StopMode, StopPool
from benchmarks.fleet_values import EPOCH, Disk, Failure, Live, Outcome, Planner, Request, Statistics, Workload, instant
from benchmarks.fleet_workloads import START_UP

#: No lease expires here, and no agent is replaced.
NEVER, AGENT = EPOCH + timedelta(days=1), 1
#: Seconds from the end of a process until its bytes are seen to be back.
UNLOAD = 1.0
#: Seconds after which a pool knows by its dry run what it needs.
DRY_RUN = 0.5
#: Seconds between two plans when nothing happens.
TICK_WAITING, TICK_IDLE = 1.0, 10.0
#: Seconds of waiting that count as one class better where requests are begun by class.
PATIENCE = 30.0


class Simulation:
    """One run."""

    def __init__(
        self, workload: Workload, planner: Planner, *, resident: bool = False, tick: float = TICK_IDLE
    ) -> None:
        """
        With `resident`, every model has devices of its own from the beginning: the upper bound. `tick`: seconds between
        two plans when nothing happens.
        """
        self.workload, self.planner, self.resident, self.tick = workload, planner, resident, tick
        self.now = 0.0
        self.devices = {device.id: device for device in workload.devices}
        self.configurations = {c.id: c for c in workload.configurations}
        self.pools: dict[str, Live] = {}
        self.of: dict[str, list[Live]] = {c: [] for c in self.configurations}
        self.queues: dict[str, dict[Priority, deque[Request]]] = {
            c: {p: deque() for p in Priority} for c in self.configurations
        }
        self.waiting = 0
        self.left = sum(1 + len(request.then) for request in workload.requests)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.number = 0
        self.dirty = True
        self.next_tick = 0.0
        self.statistics = Statistics(workload.arrivals)
        self.stopped_at: dict[str, float] = {}
        self.measured: set[str] = set()
        #: Requests in flight that others follow.
        self.followed: dict[int, Request] = {}
        self.outcome = Outcome()
        self.observed = 0.0
        self.charged_now = self.useful_now = 0
        self.disks = {device.host: Disk() for device in workload.devices}
        self.ledger = Ledger()
        for host in sorted({device.host for device in workload.devices}):
            self.join(host)

    # ---- time ------------------------------------------------------------------------------------------------------

    def at(self, time: float, do: Callable[[], None]) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, do))

    def run(self, patience: float = 600.0) -> Outcome:
        """To the end of all requests, or for `patience` seconds after the last arrival."""
        for request in self.workload.requests:
            self.at(request.ready, partial(self.arrive, request))
        for failure in self.workload.failures:
            self.at(failure.at, partial(self.fail, failure))
        if self.resident:
            for configuration in self.configurations.values():
                self.stay(configuration)
        limit = self.workload.length + patience
        while self.left and self.now < limit:
            time = min(self.events[0][0] if self.events else math.inf, self.next_tick)
            self.observe(time)
            self.now = time
            while self.events and self.events[0][0] <= time:
                heapq.heappop(self.events)[2]()
            if (self.dirty or time >= self.next_tick) and not self.resident:
                self.plan()
            self.next_tick = self.now + (TICK_WAITING if self.waiting else self.tick)
        for queue in self.queues.values():
            for requests in queue.values():
                self.outcome.requests += requests
        for pool in self.pools.values():
            self.outcome.requests += [request for _, _, request in pool.work]
        self.outcome.end = self.now
        return self.outcome

    def observe(self, until: float) -> None:
        if (span := min(until, self.workload.length) - self.observed) > 0:
            self.observed += span
            self.outcome.capacity += span * sum(device.capacity_bytes for device in self.devices.values())
            self.outcome.charged += span * self.charged_now
            self.outcome.useful += span * self.useful_now

    def measure(self) -> None:
        """After a change: has anybody bytes that are not there?"""
        live: Counter[str] = Counter()
        useful = 0
        for pool in self.pools.values():
            if pool.has_process:
                live.update(pool.bytes)
                useful += sum(pool.bytes.values()) if pool.work else 0
        self.charged_now, self.useful_now = live.total(), useful
        if not self.resident:
            self.outcome.overcommitments += sum(
                size > self.devices[device].capacity_bytes for device, size in live.items()
            )

    # ---- requests --------------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        request.ready = self.now
        self.statistics.arrived(request, self.now)
        self.queues[request.configuration][request.priority].append(request)
        self.waiting += 1
        self.dispatch(request.configuration)
        if math.isnan(request.started):
            self.dirty = True

    def next_of(self, configuration: str) -> Request | None:
        heads = [queue[0] for queue in self.queues[configuration].values() if queue]
        if self.planner.by_class:
            return min(heads, key=lambda r: (r.priority.rank - (self.now - r.ready) / PATIENCE, r.ready), default=None)
        return min(heads, key=lambda r: r.ready, default=None)

    def dispatch(self, configuration: str) -> None:
        """Hand waiting requests to free slots, first on the pool that works least."""
        while request := self.next_of(configuration):
            free = [
                pool
                for pool in self.of[configuration]
                if pool.state is PoolState.SERVING and len(pool.work) < pool.configuration.slots
            ]
            if not free:
                return
            self.queues[configuration][request.priority].popleft()
            self.waiting -= 1
            pool = min(free, key=lambda p: (len(p.work), -p.rate, p.id))
            self.advance(pool)
            request.started = pool.used = self.now
            self.number += 1
            heapq.heappush(pool.work, (pool.clock + request.tokens / pool.speed, self.number, request))
            if request.then:
                self.followed[id(request)] = request
            self.share(pool)

    def advance(self, pool: Live) -> None:
        """Bring the pool's own clock up to now, and count what its requests had."""
        span, pool.seen = self.now - pool.seen, self.now
        if span <= 0 or not pool.work:
            return
        pool.clock += span * pool.rate
        self.statistics.worked(pool, span, self.now)

    def share(self, changed: Live) -> None:
        """Divide the speed of devices among the pools that work there, and look when each ends its next request."""
        active: defaultdict[str, float] = defaultdict(float)
        for pool in self.pools.values():
            if pool.work:
                for device in pool.bytes:
                    active[device] += 1 / len(pool.bytes)
        for pool in self.pools.values():
            if pool is changed or (pool.work and pool.bytes.keys() & changed.bytes.keys()):
                self.advance(pool)
                beside = sum(active[device] for device in pool.bytes) / len(pool.bytes) - 1 / len(pool.bytes)
                pool.rate = 1.0 if self.resident else 1 / (1 + max(beside, 0.0))
                pool.version += 1
                if pool.work:
                    ends = self.now + max(pool.work[0][0] - pool.clock, 0.0) / pool.rate
                    self.at(ends, partial(self.finish, pool, pool.version))
        self.measure()

    def finish(self, pool: Live, version: int) -> None:
        if version != pool.version:
            return
        self.advance(pool)
        while pool.work and pool.work[0][0] <= pool.clock + 1e-6:
            self.end_request(pool, heapq.heappop(pool.work)[2])
        pool.used = self.now
        self.dispatch(pool.configuration.id)
        self.share(pool)
        self.dirty = self.dirty or self.waiting > 0 or not pool.work
        if not pool.work and pool.state is PoolState.DRAINING:
            self.end(pool)

    def end_request(self, pool: Live, request: Request) -> None:
        request.finished = self.now
        self.outcome.requests.append(request)
        self.left -= 1
        pool.served += 1
        self.statistics.ended(request, self.now)
        self.followed.pop(id(request), None)
        if request.then:
            configuration, prompt, answer = request.then[0]
            rest = request.then[1:]
            self.arrive(Request(configuration, request.priority, request.namespace, self.now, prompt, answer, rest))

    # ---- pools -----------------------------------------------------------------------------------------------------

    def stay(self, configuration: Configuration) -> None:
        """The bound: a pool that needs no start, on devices of its own."""
        layout = max(configuration.layouts, key=lambda one: one.tokens_per_second)
        pool = self.make(configuration, {f"{configuration.id}/{n}": part for n, part in enumerate(layout.parts)}, "")
        pool.state, pool.loaded, pool.speed = PoolState.SERVING, 0.0, layout.tokens_per_second

    def make(self, configuration: Configuration, bytes_: Mapping[str, int], namespace: str) -> Live:
        self.number += 1
        devices = [self.devices[id_] for id_ in bytes_ if id_ in self.devices]
        types = {device.type for device in devices}
        layout = min(configuration.layouts, key=lambda x: (x.type not in types, abs(len(x.parts) - len(bytes_))))
        load = layout.load.total_seconds()
        pool = Live(
            id=f"p{self.number:06}",
            configuration=configuration,
            bytes=dict(bytes_),
            state=PoolState.WAITING,
            granted=self.now,
            namespace=namespace,
            load=load,
            speed=layout.tokens_per_second * min((device.speed for device in devices), default=1.0),
            expected=self.now + load,
        )
        self.pools[pool.id] = pool
        self.of[configuration.id].append(pool)
        return pool

    def grant(self, configuration: str, bytes_: Mapping[str, int], after: frozenset[str], namespace: str) -> bool:
        """Claim the bytes; all or nothing."""
        pool = self.make(self.configurations[configuration], bytes_, namespace)
        claim = ReservationRequest(
            id=pool.id,
            epoch=self.number,
            host=self.devices[next(iter(bytes_))].host,
            configuration=configuration,
            bytes=bytes_,
            lease_until=NEVER,
            after=after,
        )
        if len({self.devices[device].host for device in bytes_}) > 1:
            granted = self.claim_over_hosts(claim)
        else:
            granted = self.keep(rules.claim(self.ledger, claim))
        if not granted:
            self.drop(pool)
            self.outcome.refused_grants += 1
        return granted

    def claim_over_hosts(self, claim: ReservationRequest) -> bool:
        """Claim for rules that treat the whole fleet as one host, unlike the ledger."""
        devices = {id_: replace(one, host=claim.host) for id_, one in self.ledger.devices.items()}
        refused = rules.claim(replace(self.ledger, devices=devices), claim)
        if isinstance(refused, ReservationRefused):
            return False
        return self.keep(replace(refused, devices=self.ledger.devices))

    def keep(self, changed: Ledger | ReservationRefused) -> bool:
        if isinstance(changed, ReservationRefused):
            return False
        self.ledger = changed
        return True

    def go_on(self) -> None:
        """Start pools that no longer wait for others."""
        for pool in list(self.pools.values()):
            if pool.state is PoolState.WAITING and not self.ledger.reservations[pool.id].backing:
                self.load(pool)

    def load(self, pool: Live) -> None:
        self.ledger = rules.activate(self.ledger, pool.id, AGENT, NEVER)
        pool.state, pool.expected = PoolState.STARTING, self.now + pool.load
        self.outcome.loads += 1
        self.outcome.loading_seconds += pool.load
        self.outcome.reloads += self.now - self.stopped_at.get(pool.configuration.id, -math.inf) < 60
        if pool.configuration.id in self.workload.truth and pool.configuration.id not in self.measured:
            self.at(self.now + DRY_RUN, partial(self.adjust, pool))
        self.read(self.host_of(pool), pool)
        self.measure()

    def host_of(self, pool: Live) -> str:
        return self.devices[next(iter(pool.bytes))].host

    def read(self, host: str, joins: Live | None = None, version: int | None = None) -> None:
        """Divide the disk of a host among the pools that load there."""
        disk = self.disks[host]
        if version is not None and version != disk.version:
            return
        for id_ in disk.advance(self.now):
            if pool := self.pools.get(id_):
                self.at(self.now + START_UP, partial(self.loaded, pool, pool.version))
        disk.readers = {id_: left for id_, left in disk.readers.items() if id_ in self.pools}
        if joins is not None:
            disk.readers[joins.id] = max(joins.load - START_UP, 2e-6)
        if disk.readers:
            self.at(self.now + disk.next_end, partial(self.read, host, None, disk.version))

    def loaded(self, pool: Live, version: int) -> None:
        if pool.id in self.pools and pool.state is PoolState.STARTING and version == pool.version:
            pool.state, pool.loaded, self.dirty = PoolState.SERVING, self.now, True
            self.dispatch(pool.configuration.id)
            self.measure()

    def adjust(self, pool: Live) -> None:
        """Apply the footprint of the dry run: the pool continues with it, or ends before it uses memory."""
        id_ = pool.configuration.id
        if pool.id not in self.pools or id_ in self.measured:
            return
        self.measured.add(id_)
        factor, before = self.workload.truth[id_], self.configurations[id_]
        layouts = tuple(replace(one, parts=tuple(int(part * factor) for part in one.parts)) for one in before.layouts)
        self.configurations[id_] = replace(before, layouts=layouts)
        held = self.ledger.reservations[pool.id]
        wanted = {device: int(size * factor) for device, size in pool.bytes.items()}
        if not held.draining:
            if self.keep(rules.adjust(self.ledger, pool.id, held.epoch, held.revision, wanted)):
                pool.bytes = wanted
            else:
                self.outcome.failed_loads += 1
                self.stop(pool, StopMode.DRAIN)
        self.dirty = True
        self.measure()

    def stop(self, pool: Live, how: StopMode) -> None:
        if pool.state is PoolState.WAITING:
            self.ledger = rules.cancel(self.ledger, pool.id)
            self.drop(pool)
            return
        self.ledger = rules.drain(self.ledger, pool.id)
        pool.state, pool.stopping = PoolState.DRAINING, self.now
        if how is StopMode.PREEMPT:
            self.preempt(pool)
        if not pool.work:
            self.end(pool)
        else:
            self.at(self.now + self.planner.drain, partial(self.cut_short, pool))

    def cut_short(self, pool: Live) -> None:
        """End a drain that reached its limit."""
        if pool.work and pool.id in self.pools:
            self.preempt(pool)
            self.end(pool)

    def preempt(self, pool: Live) -> None:
        self.advance(pool)
        back = sorted((request for _, _, request in pool.work), key=lambda r: r.ready, reverse=True)
        pool.work.clear()
        self.share(pool)
        for request in back:
            request.started = math.nan
            request.preempted += 1
            self.outcome.preempted += 1
            self.followed.pop(id(request), None)
            self.queues[request.configuration][request.priority].appendleft(request)
            self.waiting += 1
        self.dispatch(pool.configuration.id)

    def end(self, pool: Live) -> None:
        pool.version += 1
        self.at(self.now + UNLOAD, partial(self.release, pool))

    def release(self, pool: Live) -> None:
        """Its bytes are back."""
        if pool.id not in self.pools:
            return
        self.ledger = rules.release(self.ledger, pool.id, AGENT)
        self.stopped_at[pool.configuration.id] = self.now
        self.outcome.unused_loads += not pool.served
        self.drop(pool)
        self.go_on()

    def drop(self, pool: Live) -> None:
        del self.pools[pool.id]
        self.of[pool.configuration.id].remove(pool)
        self.read(self.host_of(pool))
        self.dirty = True
        self.measure()

    def join(self, host: str) -> None:
        """The host's agent says which of its devices there are."""
        there = {
            d.id: d.capacity_bytes for d in self.devices.values() if d.host == host and d.state is HostState.SCHEDULABLE
        }
        self.ledger = rules.join(self.ledger, host, AGENT, there)

    def fail(self, failure: Failure) -> None:
        device = self.devices[failure.device] = replace(self.devices[failure.device], state=HostState.LOST)
        for pool in [p for p in self.pools.values() if failure.device in p.bytes]:
            if pool.has_process:
                pool.state = PoolState.DRAINING
                self.preempt(pool)
            self.ledger = rules.release(self.ledger, pool.id, AGENT)
            self.drop(pool)
        self.join(device.host)
        self.go_on()
        self.at(failure.at + failure.lasts, partial(self.repair, failure))

    def repair(self, failure: Failure) -> None:
        device = self.devices[failure.device] = replace(self.devices[failure.device], state=HostState.SCHEDULABLE)
        self.join(device.host)
        self.dirty = True

    # ---- the planner -----------------------------------------------------------------------------------------------

    def plan(self) -> None:
        self.dirty = False
        fleet, demand, now = self.fleet(), self.demand(), instant(self.now)
        began = process_time()
        plan = self.planner.plan(fleet, demand, now)
        took = process_time() - began
        self.outcome.plans += 1
        self.outcome.plan_seconds += took
        self.outcome.slowest_plan = max(self.outcome.slowest_plan, took)
        if plan.actions:
            self.apply(plan)
            self.outcome.overcommitments += len(rules.problems(self.ledger))

    def apply(self, plan: Plan) -> None:
        for action in plan.actions:
            match action:
                case StopPool():
                    pool = self.pools[action.pool]
                    if pool.state in COMING:
                        self.stop(pool, action.mode)
                    elif action.mode is StopMode.PREEMPT:
                        self.cut_short(pool)
                case StartPool():
                    self.grant(action.configuration, action.bytes, action.after, action.namespace)
                case MovePool():
                    pool = self.pools[action.pool]
                    self.outcome.moves += self.grant(pool.configuration.id, action.bytes, frozenset(), pool.namespace)
                    self.stop(pool, StopMode.DRAIN)
                case GrantReserve():
                    self.number += 1
                    reserve = ReservedCapacity(f"r{self.number}", action.configuration, action.bytes)
                    self.keep(rules.add_reserve(self.ledger, reserve))
                case DropReserve():
                    self.ledger = rules.drop_reserve(self.ledger, action.reserve)
        self.go_on()

    def fleet(self) -> Cluster:
        return Cluster(
            devices=tuple(self.devices.values()),
            pools=tuple(self.seen(pool) for pool in self.pools.values()),
            configurations=tuple(self.configurations.values()),
            reserves=tuple(self.ledger.reserves.values()),
            rates=self.statistics.rates(self.now),
            accounts=self.statistics.accounts(self.now),
            arrivals=dict(self.statistics.arrivals),
        )

    def seen(self, pool: Live) -> Pool:
        mean, held = self.statistics.mean(pool.configuration.id), self.ledger.reservations[pool.id]
        # The last of n requests ends, if each may end at any time, after about that many of their mean.
        left = mean / 2 * (1 + math.log(len(pool.work))) if pool.work else 0.0
        return Pool(
            id=pool.id,
            configuration=pool.configuration.id,
            state=pool.state,
            bytes=pool.bytes,
            slots=pool.configuration.slots,
            started=instant(pool.granted),
            busy=len(pool.work),
            serving=min((r.priority for _, _, r in pool.work), key=lambda p: p.rank, default=None),
            work_left=timedelta(seconds=left),
            preemptions=max((r.preempted for _, _, r in pool.work), default=0),
            loaded=None if pool.loaded is None else instant(pool.loaded),
            last_used=None if pool.used is None else instant(pool.used),
            expected=instant(pool.expected) if pool.loaded is None else None,
            stopping=None if pool.stopping is None else instant(pool.stopping),
            backing=held.backing,
            namespace=pool.namespace,
        )

    def demand(self) -> list[WaitingSteps]:
        waiting: dict[tuple[str, Priority, str], list[float]] = defaultdict(list)
        if self.waiting:
            for configuration, queue in self.queues.items():
                for priority, requests in queue.items():
                    for request in requests:
                        waiting[configuration, priority, request.namespace].append(request.ready)
        soon: dict[tuple[str, Priority, str], list[float]] = defaultdict(list)
        for request in self.followed.values():
            mean = self.statistics.mean(request.configuration)
            left = max(request.started + mean - self.now, mean / 4)
            soon[request.then[0][0], request.priority, request.namespace].append(self.now + left)
        found = [self.group(key, times) for key, times in waiting.items()]
        return found + [replace(self.group(key, times), ready=instant(min(times))) for key, times in soon.items()]

    def group(self, key: tuple[str, Priority, str], times: Sequence[float]) -> WaitingSteps:
        return WaitingSteps(
            model=key[0],
            priority=key[1],
            steps=len(times),
            oldest=instant(min(times)),
            mean=instant(sum(times) / len(times)),
            namespace=key[2],
            work=timedelta(seconds=self.statistics.mean(key[0])),
        )
