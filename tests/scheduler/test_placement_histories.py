"""Sequences of plans on simulated clusters and the real ledger: no thrashing, no starvation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.fleet.host import HostState
from app.fleet.ledger import rules
from app.fleet.ledger.reservation import (
    Ledger,
    Reservation,
    ReservationRefused,
    ReservationRequest,
    ReservationState,
    ReservedCapacity,
)
from app.fleet.pool import PoolState
from app.kernel.errors import LeaseLost
from app.kernel.priority import Priority
from app.scheduler.planner.cluster import (
    Cluster,
    Configuration,
    Device,
    Pool,
    Reserve,
    charges,
)
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.placement import plan
from app.scheduler.planner.plan import DropReserve, GrantReserve, MovePool, StartPool, StopMode, StopPool
from app.scheduler.planner.policy import PlacementPolicy
from benchmarks import fleet_scenarios, fleet_workloads
from benchmarks.fleet_simulator import Simulation
from benchmarks.fleet_values import Failure, Outcome, Request, Workload
from benchmarks.scheduling import CONTENDERS, OWN, PROMISES, Arriero, compare
from tests.scheduler.clusters import GB, gpu, model, ram

POLICY = PlacementPolicy()


def simulated(
    devices: tuple[Device, ...],
    models: tuple[Configuration, ...],
    requests: list[Request],
    failures: tuple[Failure, ...] = (),
) -> Outcome:
    length = max((request.ready for request in requests), default=0.0)
    outcome = Simulation(Workload(devices, models, tuple(requests), length, failures), Arriero(POLICY)).run()
    assert outcome.overcommitments == 0
    assert outcome.refused_grants == 0, "the ledger refuses nothing that is planned"
    return outcome


def waits(outcome: Outcome, configuration: str) -> list[float]:
    return [request.started - request.ready for request in outcome.requests if request.configuration == configuration]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_random_histories_keep_the_ledgers_promises_and_serve_all_requests(seed: int) -> None:
    chance = Random(seed)
    devices = fleet_workloads.gpus([chance.choice((11.0, 22.0)) for _ in range(chance.choice((2, 4)))])
    largest = max(device.capacity_bytes for device in devices) / 10**9
    kept = fleet_workloads.model("kept", chance.uniform(1, 3), min_pools=chance.randrange(2))
    models = (kept, *(fleet_workloads.model(f"m{n}", chance.uniform(1, largest - 3)) for n in range(4)))
    requests = [
        Request(
            chance.choice(models).id,
            chance.choice(tuple(Priority)),
            chance.choice("ab"),
            chance.uniform(0, 120),
            500,
            100,
            then=((chance.choice(models).id, 100, 50),) * chance.randrange(2),
        )
        for _ in range(40)
    ]
    failures = (Failure(60, "gpu-0", 30),) if chance.random() < 0.3 else ()
    outcome = simulated(devices, models, requests, failures)

    assert len(outcome.requests) == sum(1 + len(request.then) for request in requests)
    assert [request for request in outcome.requests if math.isnan(request.finished)] == []


@pytest.mark.parametrize("rate", [0.1, 0.5, 2.0])
def test_two_models_that_never_fit_together_do_not_thrash(rate: float) -> None:
    """A device with work loads for a bounded part of the time, or only when it is idle."""
    models = (fleet_workloads.model("a", 14), fleet_workloads.model("b", 15))
    requests = [Request("ab"[n % 2], Priority.STANDARD, "", n / rate, 500, 200) for n in range(int(300 * rate))]
    outcome = simulated(fleet_workloads.gpus((22.0,), 1), models, requests)

    loads = [configuration.layouts[0].load.total_seconds() for configuration in models]
    assert outcome.loads <= 2 + len(requests)
    busy = outcome.end - outcome.loading_seconds
    if rate > 1:  # it always has work
        assert outcome.loading_seconds <= busy / POLICY.amortise + 2 * max(loads)


def test_a_model_that_fits_is_served_though_another_never_stops() -> None:
    """Within the bound, the time that a pool stays fresh, and the work in flight."""
    models = (fleet_workloads.model("hot", 14), fleet_workloads.model("cold", 15))
    requests = [Request("hot", Priority.STANDARD, "a", n * 0.5, 500, 200) for n in range(1200)]
    requests.append(Request("cold", Priority.STANDARD, "b", 100, 500, 200))
    outcome = simulated(fleet_workloads.gpus((22.0,), 1), models, sorted(requests, key=lambda request: request.ready))

    load = models[0].layouts[0].load.total_seconds()
    assert max(waits(outcome, "cold")) < POLICY.bound[Priority.STANDARD] + (POLICY.amortise + 2) * load + 30


@pytest.mark.parametrize("scenario", fleet_scenarios.SCENARIOS)
def test_no_scenario_of_the_benchmark_breaks_a_promise(scenario: str) -> None:
    (row,) = compare({OWN: CONTENDERS[OWN]}, scenario, fleet_workloads.Arrivals(None, 60.0), [3])[OWN]

    assert {key: row[key] for key in PROMISES} == dict.fromkeys(PROMISES, 0)
    assert row["requests"] > 0


# ---- histories with failures of everything ----

#: Short bounds, so that histories are short.
HASTY = PlacementPolicy(bound={Priority.INTERACTIVE: 10.0, Priority.STANDARD: 20.0, Priority.BATCH: 30.0})
LEASE, HOLD = timedelta(seconds=10), timedelta(seconds=60)
BEGINNING = datetime(2030, 1, 1, tzinfo=UTC)


@dataclass(eq=False)
class Step:
    """A step that waits for a model."""

    configuration: str
    priority: Priority
    since: datetime
    preemptions: int = 0


@dataclass
class Process:
    """The process of a pool. The ledger knows only what messages say about it."""

    id: str
    configuration: Configuration
    bytes: dict[str, int]
    epoch: int
    began: datetime
    alive: bool = True
    #: A process that hangs renews nothing and serves nothing; it keeps its bytes.
    hangs: bool = False
    loaded: datetime | None = None
    used: datetime | None = None
    work: list[tuple[datetime, Step]] = field(default_factory=list)


class World:
    """Two hosts with the production planner and ledger, and random failures by seed, one second at a time."""

    def __init__(self, seed: int) -> None:
        self.chance = Random(seed)
        self.now, self.number = BEGINNING, 0
        sizes = [self.chance.choice((12, 20, 20)) for _ in range(3)] + [20]
        gpus = [gpu(f"g{n}", size, f"h{n // 2}") for n, size in enumerate(sizes)]
        self.devices = {one.id: one for one in (*gpus, ram(9, "h0"), ram(9, "h1"))}
        self.models = {one.id: one for one in self.catalogue()}
        #: By host, the epoch of its live agent.
        self.agents: dict[str, int] = {}
        self.ledger = Ledger()
        for host in ("h0", "h1"):
            self.agent_begins(host)
        self.processes: dict[str, Process] = {}
        self.waiting: list[Step] = []
        #: Pools that were told to stop: when, and whether their steps are preempted.
        self.stopping: dict[str, tuple[datetime, bool]] = {}
        #: Models for which steps always wait.
        self.hot: list[str] = []
        #: Messages that were sent, and may arrive again, or late.
        self.sent: list[Callable[[], Ledger | ReservationRefused]] = []

    def catalogue(self) -> list[Configuration]:
        sizes = [self.chance.choice((4, 9, 11)) for _ in range(3)]
        apart = frozenset({"m0"}) if self.chance.random() < 0.3 else frozenset()
        found = [model(f"m{n}", size, load=self.chance.choice((1, 2, 4)), ram=n) for n, size in enumerate(sizes)]
        found[1] = replace(found[1], anti_affinity=apart)
        found.append(model("split", 10, 10, load=3, ram=7))
        found.append(model("kept", 2, load=1, min_pools=self.chance.randrange(2), pinned=self.chance.random() < 0.3))
        found.append(model("owner", 6, load=1, reserve=Reserve(1, timedelta(seconds=4))))
        return found

    def next(self) -> int:
        self.number += 1
        return self.number

    # -- messages --

    def sends(self, message: Callable[[], Ledger | ReservationRefused]) -> bool:
        self.sent = [*self.sent[-20:], message]
        return self.arrives(message)

    def arrives(self, message: Callable[[], Ledger | ReservationRefused]) -> bool:
        try:
            result = message()
        except LeaseLost:
            return False
        if isinstance(result, Ledger):
            self.ledger = result
        return isinstance(result, Ledger)

    # -- agents and pools --

    def agent_begins(self, host: str) -> None:
        epoch = self.agents[host] = self.next()
        there = {d.id: d.capacity_bytes for d in self.devices.values() if d.host == host}
        self.ledger = rules.join(self.ledger, host, epoch, there)

    def agents_act(self) -> None:
        for reservation in list(self.ledger.reservations.values()):
            agent, process = self.agents.get(reservation.host), self.processes.get(reservation.id)
            if agent is None:
                continue
            if reservation.state is ReservationState.HELD and not reservation.backing:
                until = self.now + LEASE
                if self.sends(partial(self.activates, reservation.id, agent, until)):
                    made = Process(
                        reservation.id,
                        self.models[reservation.configuration],
                        dict(reservation.bytes),
                        reservation.epoch,
                        self.now,
                    )
                    self.processes[reservation.id] = made
            elif process is not None and reservation.state is not ReservationState.HELD:
                ends = reservation.draining and process.loaded is not None and not process.work
                if (
                    ends
                    or (reservation.draining and process.loaded is None)
                    or reservation.state is ReservationState.SUSPECT
                ):
                    self.dies(process)
                if not process.alive:
                    self.sends(partial(self.releases, reservation.id, agent))

    # The content of a message is fixed when it is sent; the ledger is the one at its arrival.
    def activates(self, id_: str, agent: int, until: datetime) -> Ledger:
        return rules.activate(self.ledger, id_, agent, until)

    def releases(self, id_: str, agent: int) -> Ledger:
        return rules.release(self.ledger, id_, agent)

    def renews(self, id_: str, epoch: int, until: datetime) -> Ledger:
        return rules.renew(self.ledger, id_, epoch, until)

    def dies(self, process: Process) -> None:
        process.alive = False
        self.preempts(process)

    def preempts(self, process: Process) -> None:
        for _, step in process.work:
            step.preemptions += 1
            self.waiting.append(step)
        process.work.clear()

    def pools_act(self) -> None:
        for process in self.living():
            if process.hangs:
                continue
            if not self.sends(partial(self.renews, process.id, process.epoch, self.now + LEASE)):
                self.dies(process)  # its bytes were released: it ends
                continue
            if process.loaded is None and self.now - process.began >= process.configuration.layouts[0].load:
                process.loaded = self.now
            process.work = [(ends, step) for ends, step in process.work if ends > self.now]
            if self.stopping.get(process.id, (self.now, False))[1]:
                self.preempts(process)
            self.takes_work(process)

    def takes_work(self, process: Process) -> None:
        if process.loaded is None or self.ledger.reservations[process.id].draining:
            return
        mine = [step for step in self.waiting if step.configuration == process.configuration.id]
        for step in sorted(mine, key=lambda one: one.since)[: 2 - len(process.work)]:
            self.waiting.remove(step)
            process.work.append((self.now + timedelta(seconds=self.chance.choice((1, 3, 20))), step))
            process.used = self.now

    def living(self) -> list[Process]:
        return [process for process in self.processes.values() if process.alive]

    # -- the planner --

    def plans(self) -> None:
        self.ledger = rules.expire(self.ledger, self.now)
        for action in plan(self.cluster(), self.demand(), self.now, HASTY).actions:
            match action:
                case StartPool():
                    self.grants(action.configuration, action.bytes, action.after, action.pinned)
                case StopPool():
                    self.stops(action.pool, action.mode)
                case MovePool():
                    moved = self.ledger.reservations[action.pool]
                    self.grants(moved.configuration, action.bytes, frozenset(), moved.pinned)
                    self.stops(action.pool, StopMode.DRAIN)
                case GrantReserve():
                    reserve = ReservedCapacity(f"r{self.next()}", action.configuration, action.bytes)
                    assert self.arrives(lambda reserve=reserve: rules.add_reserve(self.ledger, reserve))  # type: ignore[misc] # mypy does not infer a lambda with a default
                case DropReserve():
                    self.ledger = rules.drop_reserve(self.ledger, action.reserve)

    def grants(self, configuration: str, bytes_: Mapping[str, int], after: frozenset[str], pinned: bool) -> None:
        epoch, host = self.next(), self.devices[next(iter(bytes_))].host
        claim = ReservationRequest(f"p{epoch:04}", epoch, host, configuration, bytes_, self.now + HOLD, after, pinned)
        result = rules.claim(self.ledger, claim)
        assert isinstance(result, Ledger), f"planned, and refused: {result}"
        self.ledger = result

    def stops(self, id_: str, how: StopMode) -> None:
        if self.ledger.reservations[id_].state is ReservationState.HELD:
            self.ledger = rules.cancel(self.ledger, id_)
        else:
            self.ledger = rules.drain(self.ledger, id_)
            since, before = self.stopping.get(id_, (self.now, False))
            self.stopping[id_] = since, before or how is StopMode.PREEMPT

    def cluster(self) -> Cluster:
        alive = {host: HostState.SCHEDULABLE if host in self.agents else HostState.CORDONED for host in ("h0", "h1")}
        alive |= {host: HostState.LOST for host in alive if host not in self.ledger.agents}
        return Cluster(
            tuple(replace(device, state=alive[device.host]) for device in self.devices.values()),
            tuple(self.observed(one) for one in self.ledger.reservations.values()),
            tuple(self.models.values()),
            tuple(self.ledger.reserves.values()),
            {model: {Priority.INTERACTIVE: 2.0} for model in self.hot},
        )

    def observed(self, reservation: Reservation) -> Pool:
        process = self.processes.get(reservation.id)
        if reservation.state is ReservationState.SUSPECT:
            state = PoolState.SUSPECT
        elif reservation.draining:
            state = PoolState.DRAINING
        elif reservation.state is ReservationState.HELD and reservation.backing:
            state = PoolState.WAITING
        else:
            state = PoolState.SERVING if process is not None and process.loaded else PoolState.STARTING
        work = process.work if process is not None else []
        return Pool(
            id=reservation.id,
            configuration=reservation.configuration,
            state=state,
            bytes=reservation.bytes,
            slots=2,
            started=BEGINNING + timedelta(seconds=reservation.epoch),
            busy=len(work),
            serving=min((step.priority for _, step in work), key=lambda one: one.rank, default=None),
            work_left=timedelta(seconds=3 if work else 0),
            preemptions=max((step.preemptions for _, step in work), default=0),
            loaded=process.loaded if process is not None else None,
            last_used=process.used if process is not None else None,
            expected=self.now,
            stopping=self.stopping.get(reservation.id, (None, False))[0],
            preempting=self.stopping.get(reservation.id, (None, False))[1],
            epoch=reservation.epoch,
            pinned=reservation.pinned,
            backing=reservation.backing,
        )

    def demand(self) -> list[WaitingSteps]:
        return [WaitingSteps(one.configuration, one.priority, 1, one.since) for one in self.waiting]

    # -- time and events --

    def second(self) -> None:
        self.now += timedelta(seconds=1)
        self.pools_act()
        self.agents_act()
        self.plans()
        self.check()

    def asks(self, priority: Priority | None = None, configuration: str | None = None) -> Step:
        chosen = priority or self.chance.choice(tuple(Priority))
        step = Step(configuration or self.chance.choice(list(self.models)), chosen, self.now)
        self.waiting.append(step)
        return step

    def floods(self) -> None:
        """Two steps of each hot model always wait."""
        for name in self.hot:
            for _ in range(2 - sum(step.configuration == name for step in self.waiting)):
                self.asks(Priority.INTERACTIVE, name)

    def breaks_something(self) -> None:
        match self.chance.randrange(7):
            case 0 if living := self.living():
                self.dies(self.chance.choice(living))
            case 1 if living := self.living():
                self.chance.choice(living).hangs = True
            case 2:  # the agent is replaced or returns; messages of its predecessor are rejected
                host = self.chance.choice(("h0", "h1"))
                before = self.agents.get(host, 0)
                self.agent_begins(host)
                for process in self.living():
                    assert not self.arrives(partial(self.releases, process.id, before))
                    assert not self.arrives(partial(self.renews, process.id, process.epoch - 1, self.now + LEASE))
            case 3:
                self.agents.pop(self.chance.choice(("h0", "h1")), None)
            case 4:  # its pools have ended before
                host = self.chance.choice(("h0", "h1"))
                for process in self.living():
                    if self.devices[next(iter(process.bytes))].host == host:
                        self.dies(process)
                self.agents.pop(host, None)
                self.ledger = rules.declare_host_lost(self.ledger, host)
            case 5:
                device = self.chance.choice(list(self.devices.values()))
                self.devices[device.id] = replace(device, unmanaged_bytes=self.chance.choice((0, 0, 5 * GB)))
            case _ if self.sent:
                self.arrives(self.chance.choice(self.sent))

    def calms_down(self) -> None:
        """No more failures; agents and devices recover."""
        for host in ("h0", "h1"):
            self.agent_begins(host)
        self.devices = {id_: replace(device, unmanaged_bytes=0) for id_, device in self.devices.items()}

    def check(self) -> None:
        assert rules.problems(self.ledger) == []
        assert charges(self.cluster()) == {id_: self.ledger.charged(id_) for id_ in self.devices}
        for device in self.devices.values():
            touched = sum(process.bytes.get(device.id, 0) for process in self.living())
            assert touched <= device.capacity_bytes, f"{touched} bytes of {device.id} are touched"
        for process in self.living():
            reservation = self.ledger.reservations.get(process.id)
            assert reservation is not None, f"{process.id} is alive, and its bytes were granted to others"
            assert reservation.epoch == process.epoch


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_no_byte_has_two_holders_in_any_failure_and_waiting_steps_are_served_after_it(seed: int) -> None:
    """
    Crashes, hangs, expiries, lost hosts, replaced agents, late messages, unmanaged memory; then an endless flood of
    a higher class.
    """
    world = World(seed)
    for _ in range(60):
        if world.chance.random() < 0.3:
            world.asks()
        if world.chance.random() < 0.15:
            world.breaks_something()
        world.second()
    world.calms_down()
    cold = world.chance.choice(["m0", "m1", "m2", "split", "owner"])
    old = [*world.waiting, world.asks(Priority.BATCH, cold)]
    world.hot = sorted(world.models.keys() - {"kept", cold})
    for _ in range(250):
        left = [step for step in old if step in world.waiting]
        if not left:
            return
        world.floods()
        world.second()
    raise AssertionError(f"unserved: {left}; {plan(world.cluster(), world.demand(), world.now, HASTY).refusals}")
