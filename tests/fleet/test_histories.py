"""
Random histories of a whole fleet on the real Postgres, with the real planner, ledger and decisions of agents.

Hosts and processes are simulated: they start, load, serve, crash, are stopped and cut off, and get late messages. Time
passes by moving the instants of all rows back.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from sqlalchemy import text

from app.catalog import catalog
from app.fleet import views
from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.host import HostState
from app.fleet.hosts import AssignedPool, Hosts, PoolEnded
from app.fleet.ledger import session
from app.fleet.ledger.reservation import Reservation, ReservationRefused
from app.fleet.pool import Desired, PoolPhase
from app.footprint.layout import KnownLayout
from app.kernel.database import Database
from app.kernel.errors import LeaseLost
from app.kernel.priority import Priority
from app.scheduler import needs, reconcile
from app.scheduler.observation import FleetDemand
from app.scheduler.operator_commands import OperatorCommands
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.reconcile_pass import ReconcileTimes
from tests.fleet.granting import audit, device_report
from workers.agent import convergence
from workers.agent.convergence import (
    ConvergenceLimits,
    DatabaseContact,
    Kill,
    LocalProcess,
    Release,
    StartProcess,
    Terminate,
)


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


POOL_LEASE, AGENT_LEASE = 20.0, 10.0
#: A pool that could not renew its lease for this long has ended itself (workers/pool/heartbeat.py).
GONE = 0.9 * POOL_LEASE
TIMES = ReconcileTimes(hold=seconds(15), drain=seconds(20), lost_after=seconds(60))
LIMITS = ConvergenceLimits(
    start=seconds(60), drain=seconds(20), exit=seconds(5), progress=seconds(60), heartbeat=seconds(10)
)

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)

#: The devices of each host, and their bytes.
HOSTS: Mapping[str, Mapping[str, int]] = {"h": {"h0": 1000, "h1": 1000}, "i": {"i0": 800}}
CAPACITY = {device: size for devices in HOSTS.values() for device, size in devices.items()}
#: By model, the bytes on each of its devices, and the rest of its entry. One model fits nowhere.
MODELS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "a:1": ((600,), ""),
    "b:1": ((700,), "pools = { packing = 'spread' }"),
    "c:1": ((400,), "pools = { reserve = { devices = 1 } }"),
    "d:1": ((900, 900), ""),
    "e:1": ((5000,), ""),
}
TOO_LARGE = "e:1"

_QUOTA = """
    INSERT INTO quota (namespace, weight, max_bytes, held_bytes, period_seconds, device_seconds, attained_seconds)
    VALUES ('team', 1, 700, 0, 86400, 0, 0)
"""
_INSTANTS = {
    "host": ("agent_until", "joined_at", "lost_at"),
    "reservation": ("lease_until", "granted_at", "activated_at", "released_at"),
    "pool": ("created_at", "stop_at"),
    "pool_process": ("started_at", "ended_at"),
    "pool_report": ("heartbeat_at", "serving_at", "last_used_at"),
    "pool_command": ("created_at", "done_at"),
    "refusal": ("since", "at"),
    "quota": ("period_began", "counted_at"),
}
_AGE = [
    text(f"UPDATE {table} SET " + ", ".join(f"{column} = {column} - :age" for column in columns))
    for table, columns in _INSTANTS.items()
]


@dataclass
class Process:
    """A simulated process of a pool: the bytes that it believes it may use, and uses."""

    id: str
    epoch: int
    host: str
    model: str
    bytes: dict[str, int]
    born: float
    renewed: float
    phase: PoolPhase = PoolPhase.STARTING
    detail: str = ""
    asked: bool = False
    #: Stopped by a signal: it does nothing, and keeps its memory.
    frozen: bool = False
    alive: bool = True


@dataclass
class Agent:
    """The agent of a host. It forgets everything when it dies, and its processes continue."""

    host: str
    epoch: int | None = None
    alive: bool = True
    #: Requests to stop, by process, with their times.
    asked: dict[str, tuple[Desired, float]] = field(default_factory=dict)
    knows: set[str] = field(default_factory=set)
    contact: DatabaseContact = field(default_factory=lambda: DatabaseContact(LIMITS.heartbeat))


class World:
    """A fleet, with simulated hosts and processes that do not depend on its rows."""

    def __init__(self, database: Database, seed: int) -> None:
        self.database, self.chance = database, random.Random(seed)
        self.hosts = Hosts(database, seconds(AGENT_LEASE), seconds(POOL_LEASE))
        self.holder = ReservationHolder(database, seconds(POOL_LEASE))
        self.commands = OperatorCommands(database, lambda: None)
        entry = "[[models]]\nname = '{}'\nuse_cases = ['chat']\nsource = {{ path = '/m.gguf' }}\n{}\n"
        entries = "".join(entry.format(name, more) for name, (_, more) in MODELS.items())
        self.models = catalog.parse(entries, "catalog.toml").models
        self.configurations = {model.name: needs.configuration_id(model) for model in self.models}
        self.now = 0.0
        self.processes: dict[str, Process] = {}
        self.agents = {host: Agent(host) for host in HOSTS}
        self.cut: set[str] = set()
        #: By model: the time since which a step waits for it.
        self.waits: dict[str, float] = {}
        self.served: set[str] = set()
        #: Messages that arrive late, for the second time or the first.
        self.late: list[Callable[[], object]] = []
        #: The events so far, for the analysis of a failure.
        self.events: list[str] = []
        with database.work() as work:
            work.run(text(_QUOTA))
        for agent in self.agents.values():
            self.agent_runs(agent)
        layouts = [
            KnownLayout(self.configurations[name], "L4", parts, "closed form", seconds(2), 10.0)
            for name, (parts, _) in MODELS.items()
        ]
        self.hosts.declare_layouts(layouts)

    # ---- normal operation ----

    def steps_arrive(self) -> None:
        model = self.chance.choice(sorted(MODELS))
        self.waits.setdefault(model, self.now - self.chance.choice((0, 0, 50, 400)))

    def reconciles(self) -> None:
        with self.database.work() as work:
            now = work.rows(text("SELECT now() AS now"))[0].now
        waiting = [
            WaitingSteps(
                model,
                self.chance.choice(tuple(Priority)),
                1,
                now - seconds(self.now - since),
                namespace="team" if model == "a:1" else "",
                work=seconds(2),
            )
            for model, since in self.waits.items()
        ]
        rates = {model: {Priority.STANDARD: 0.05} for model in self.served}
        demand = FleetDemand(self.models, waiting, rates, {})
        done = reconcile.reconcile(self.database, lambda _: demand, TIMES)
        assert done is not None
        assert done.refused == {}, "the ledger refuses nothing that is planned"
        self.check()

    def an_agent_runs(self) -> None:
        self.agent_runs(self.agents[self.chance.choice(sorted(HOSTS))])

    def agent_runs(self, agent: Agent, *, may_die: bool = False) -> None:
        if not agent.alive or agent.host in self.cut:
            return
        try:
            if agent.epoch is None:
                self.agent_joins(agent)
            assert agent.epoch is not None
            pools = self.hosts.heartbeat(agent.host, agent.epoch, [], list(self.configurations.values()), [])
            agent.contact.note(BEGIN + seconds(self.now))
            for pool in pools:
                self.agent_converges(agent, agent.epoch, pool, may_die=may_die)
        except LeaseLost:
            agent.epoch = None
            return
        held = {pool.id for pool in pools}
        for process in self.on(agent.host):
            if process.id not in held:
                process.alive = False

    def agent_joins(self, agent: Agent) -> None:
        held = {pool.id: pool for pool in self.hosts.pools(agent.host)}
        for process in self.on(agent.host):
            if process.id not in held or held[process.id].epoch != process.epoch:
                process.alive = False
        adopted = {process.id: process.epoch for process in self.on(agent.host)}
        devices = [device_report(id_, total=size) for id_, size in HOSTS[agent.host].items()]
        agent.epoch = self.hosts.join(agent.host, agent.host, 8, devices, adopted)
        agent.knows = set(adopted)

    def agent_converges(self, agent: Agent, epoch: int, pool: AssignedPool, *, may_die: bool) -> None:
        process = self.processes.get(pool.id) if pool.id in agent.knows else None
        local = None
        if process is not None:
            asked, at = agent.asked.get(pool.id, (None, self.now))
            age, asked_ago = seconds(self.now - process.born), seconds(self.now - at)
            local = LocalProcess(process.alive, age, asked, asked_ago, agent.contact.duration)
        match convergence.decide(pool, local, LIMITS):
            case StartProcess():
                self.hosts.activate(agent.host, epoch, pool.id, 1)
                if may_die and self.chance.random() < 0.2:
                    self.agent_dies(agent)  # active bytes without a process
                    raise LeaseLost("the agent is dead")
                agent.knows.add(pool.id)
                self.processes[pool.id] = Process(
                    pool.id, pool.epoch, agent.host, pool.model, dict(pool.bytes), self.now, self.now
                )
            case Terminate():
                assert process is not None
                process.asked = True
                agent.asked[pool.id] = pool.desired, self.now
            case Kill():
                assert process is not None
                process.alive = False
            case Release(reason=reason):
                assert process is None or not process.alive
                ended = PoolEnded(pool.id, None, pool.id not in agent.asked, reason, "")
                self.hosts.release(agent.host, epoch, ended)
                self.late.append(lambda: self.hosts.release(agent.host, epoch, ended))

    def a_process_continues(self) -> None:
        if living := [process for process in self.processes.values() if process.alive]:
            self.continues(self.chance.choice(living))

    def continues(self, process: Process) -> None:
        """One heartbeat of a process, and its next action."""
        if not process.alive or process.frozen or process.host in self.cut:
            return
        serves = process.phase is PoolPhase.SERVING and process.model in self.waits
        report = HeartbeatReport(process.phase, detail=process.detail, busy=int(serves))
        begun = self.now
        try:
            if process.phase is PoolPhase.STARTING:
                self.measures(process)
            self.holder.renew(process.id, process.epoch, report)
        except LeaseLost:
            process.alive = False
            return
        process.renewed = begun
        self.late.append(lambda: self.holder.renew(process.id, process.epoch, report))
        if serves:
            self.waits.pop(process.model)
            self.served.add(process.model)
        if process.asked and process.phase is PoolPhase.SERVING:
            process.phase = PoolPhase.DRAINING
        elif process.asked or process.phase in {PoolPhase.DRAINING, PoolPhase.REFUSED}:
            process.alive = False
        elif process.phase is PoolPhase.LOADING:
            process.phase = PoolPhase.SERVING

    def measures(self, process: Process) -> None:
        """The process needs a little less or more than was reserved."""
        grant = self.holder.take(process.id, process.epoch)
        part = self.chance.choice((0.9, 1.0, 1.0, 1.05))
        wanted = {device: int(size * part) for device, size in process.bytes.items()}
        process.bytes = {device: min(size, wanted[device]) for device, size in process.bytes.items()}
        if self.chance.random() < 0.05:  # the answer is lost, and the process ends
            process.alive = False
            self.late.append(lambda: self.holder.adjust(grant, wanted))
            return
        if isinstance(refused := self.holder.adjust(grant, wanted), ReservationRefused):
            process.phase, process.detail = PoolPhase.REFUSED, refused.reason
        else:
            process.phase, process.bytes = PoolPhase.LOADING, wanted

    def time_passes(self) -> None:
        self.advance(self.chance.uniform(0.5, 10))

    def advance(self, age: float) -> None:
        with self.database.work() as work:
            for statement in _AGE:
                work.execute(statement, {"age": seconds(age)})
        self.now += age
        for process in self.processes.values():
            if not process.frozen and self.now - process.renewed > GONE:
                process.alive = False

    # ---- failures ----

    def process_dies(self) -> None:
        if living := [process for process in self.processes.values() if process.alive]:
            self.chance.choice(living).alive = False

    def process_is_frozen(self) -> None:
        if living := [process for process in self.processes.values() if process.alive]:
            self.chance.choice(living).frozen = True

    def processes_are_thawed(self) -> None:
        for process in self.processes.values():
            process.frozen = False
        self.advance(0.0)

    def an_agent_dies(self) -> None:
        self.agent_dies(self.agents[self.chance.choice(sorted(HOSTS))])

    def agent_dies(self, agent: Agent) -> None:
        agent.alive, agent.epoch = False, None
        agent.asked, agent.knows = {}, set()

    def agent_dies_in_the_middle(self) -> None:
        self.agent_runs(self.agents[self.chance.choice(sorted(HOSTS))], may_die=True)

    def agents_are_restarted(self) -> None:
        for agent in self.agents.values():
            agent.alive = True

    def host_is_cut_off(self) -> None:
        self.cut.add(self.chance.choice(sorted(HOSTS)))

    def hosts_are_connected(self) -> None:
        self.cut.clear()

    def message_comes_late(self) -> None:
        if self.late:
            with contextlib.suppress(LeaseLost):
                self.late.pop(self.chance.randrange(len(self.late)))()

    def an_operator_commands(self) -> None:
        host, model = self.chance.choice(sorted(HOSTS)), self.chance.choice(sorted(MODELS))
        acts: list[Callable[[], object]] = [
            lambda: [self.commands.mark(one, HostState.SCHEDULABLE) for one in HOSTS],
            lambda: self.commands.mark(host, self.chance.choice((HostState.CORDONED, HostState.DRAINING))),
            lambda: self.commands.start(model),
            lambda: self.commands.stop_model(model),
        ]
        self.chance.choice(acts)()

    def stale_epochs_try(self) -> None:
        held = self.reservations()
        if not held:
            return
        one = self.chance.choice(list(held.values()))
        acts: list[Callable[[], object]] = [
            lambda: self.holder.renew(one.id, one.epoch - 1, HeartbeatReport(PoolPhase.SERVING)),
            lambda: self.holder.take(one.id, one.epoch - 1),
            lambda: self.hosts.activate(one.host, 0, one.id, 1),
            lambda: self.hosts.release(one.host, 0, PoolEnded(one.id, 0, failed=False, ending="", log_tail="")),
            lambda: self.hosts.heartbeat(one.host, 0, [], [], []),
        ]
        for act in acts:
            with pytest.raises(LeaseLost):
                act()

    # ---- invariants ----

    def on(self, host: str) -> list[Process]:
        return [process for process in self.processes.values() if process.host == host and process.alive]

    def reservations(self) -> Mapping[str, Reservation]:
        with self.database.work() as work:
            return session.open_session(work, to_read=True).ledger.reservations

    def check(self) -> None:
        """No device is charged or used beyond its capacity; living processes are charged, or their host is lost."""
        audit(self.database)
        lost = {seen.name for seen in views.hosts(self.database) if seen.state == HostState.LOST}
        held = self.reservations()
        touched = dict.fromkeys(CAPACITY, 0)
        for process in self.processes.values():
            if not process.alive:
                continue
            for device, size in process.bytes.items():
                touched[device] += size
            if process.host not in lost:
                one = held.get(process.id)
                assert one is not None, f"{process} is alive without a reservation"
                assert one.epoch == process.epoch
                assert all(size <= one.bytes[device] for device, size in process.bytes.items())
        assert all(size <= CAPACITY[device] for device, size in touched.items()), touched

    def heal(self) -> None:
        """No failure happens from now on, except that one serving process is frozen. Frozen processes stay frozen."""
        serving = [one for one in self.processes.values() if one.phase is PoolPhase.SERVING and not one.frozen]
        for process in serving:
            self.continues(process)
        for process in [one for one in serving if one.alive][:1]:
            process.frozen = True
        self.cut.clear()
        self.late.clear()
        self.agents_are_restarted()
        for host in HOSTS:
            self.commands.mark(host, HostState.SCHEDULABLE)
        self.advance(0.0)

    def all_continue(self, age: float = 3.0) -> None:
        self.advance(age)
        for process in list(self.processes.values()):
            self.continues(process)
        for agent in self.agents.values():
            self.agent_runs(agent)
        self.reconciles()

    def most_continue(self) -> None:
        self.advance(self.chance.uniform(0.2, 2))
        actors: list[Callable[[], object]] = [self.reconciles]
        actors += [partial(self.continues, process) for process in self.processes.values()]
        actors += [partial(self.agent_runs, agent) for agent in self.agents.values()]
        for act in self.chance.sample(actors, k=max(len(actors) - self.chance.randrange(3), 1)):
            act()


#: The events of a history, with their weights.
ACTS: Mapping[Callable[[World], None], int] = {
    World.most_continue: 40,
    World.steps_arrive: 12,
    World.time_passes: 3,
    World.reconciles: 2,
    World.an_agent_runs: 2,
    World.a_process_continues: 2,
    World.process_dies: 3,
    World.process_is_frozen: 2,
    World.processes_are_thawed: 1,
    World.an_agent_dies: 1,
    World.agent_dies_in_the_middle: 2,
    World.agents_are_restarted: 3,
    World.host_is_cut_off: 1,
    World.hosts_are_connected: 2,
    World.message_comes_late: 5,
    World.an_operator_commands: 2,
    World.stale_epochs_try: 2,
}
_WEIGHTED = [act for act, weight in ACTS.items() for _ in range(weight)]

#: Events of a history, and passes without failures in which all models are served. A quarantine lasts longer: an
#: operator ends it.
LENGTH, PASSES = 130, 150


@pytest.mark.parametrize("seed", range(2))
def test_no_two_processes_use_the_same_byte_and_all_models_are_served(database: Database, seed: int) -> None:
    """Histories of plans, crashes, frozen processes, partitions, expiries, late messages, adoptions and commands."""
    world = World(database, seed)
    for _ in range(LENGTH):
        act = world.chance.choice(_WEIGHTED)
        world.events.append(act.__name__)
        act(world)
        world.check()

    world.heal()
    for model in MODELS:
        world.waits.setdefault(model, world.now)
    for number in range(PASSES):
        world.all_continue()
        if world.waits.keys() <= {TOO_LARGE}:
            break
        if number == PASSES // 2:
            for model in world.waits.keys() - {TOO_LARGE}:
                world.commands.start(model)
    for _ in range(25):  # a frozen process is silent for longer than its lease, and its agent kills it
        world.all_continue()
    living = {process.id for process in world.processes.values() if process.alive}
    assert not [process for process in world.processes.values() if process.alive and process.frozen]
    assert living == world.reservations().keys(), "ledger and processes agree"
    refused = {row.model: row.reason for row in views.fleet(database).refusals}
    assert world.waits.keys() <= {TOO_LARGE}, (world.waits, refused)
    assert refused[TOO_LARGE].startswith("needs 4.9 KiB on one device, and the largest")
