"""
Random histories of a whole fleet on the real Postgres: planner, ledger and the decisions of agents are the real ones.

What is made up are hosts and processes: they start, load, serve, crash, are stopped and cut off, and hear late. Time is
that of the rows: it passes by moving them back.
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
from app.fleet.hosts import Declared, Granted, Hosts, PoolEnded
from app.fleet.ledger import session
from app.fleet.ledger.reservation import Reservation, ReservationRefused
from app.fleet.pool import Desired, PoolPhase
from app.fleet.rows import HostState
from app.footprint.layout import KnownLayout
from app.kernel.database import Database
from app.kernel.errors import LeaseLost
from app.kernel.priority import Priority
from app.scheduler import needs, reconcile
from app.scheduler.operator_commands import OperatorCommands
from app.scheduler.reconcile import FleetDemand, Waiting
from app.scheduler.reconcile_pass import ReconcileTimes
from tests.fleet.granting import audit
from workers.agent import convergence
from workers.agent.convergence import Begin, ConvergenceLimits, GiveBack, Kill, Local, Terminate, Watch


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


POOL_LEASE, AGENT_LEASE = 20.0, 10.0
#: A pool that could not renew for so long is gone (workers/pool/heartbeat.py).
GONE = 0.9 * POOL_LEASE
TERMS = ReconcileTimes(hold=seconds(15), drain=seconds(20), lost_after=seconds(60))
LIMITS = ConvergenceLimits(
    start=seconds(60), drain=seconds(20), leave=seconds(5), progress=seconds(60), silence=seconds(10)
)

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)

#: By host, its devices and what they hold.
HOSTS: Mapping[str, Mapping[str, int]] = {"h": {"h0": 1000, "h1": 1000}, "i": {"i0": 800}}
CAPACITY = {device: size for devices in HOSTS.values() for device, size in devices.items()}
#: By model, the bytes on each of its devices, and the rest of its entry. One fits nowhere.
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
_PASS = [
    text(f"UPDATE {table} SET " + ", ".join(f"{column} = {column} - :age" for column in columns))
    for table, columns in _INSTANTS.items()
]


@dataclass
class Process:
    """A pool's process: what it believes that it may touch, and does."""

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
    #: Stopped by a signal: it does nothing, and touches what it has.
    frozen: bool = False
    alive: bool = True


@dataclass
class Agent:
    """The agent of a host. It forgets everything when it dies; its processes live on."""

    host: str
    epoch: int | None = None
    alive: bool = True
    #: By process, what it was asked for, and when.
    asked: dict[str, tuple[Desired, float]] = field(default_factory=dict)
    knows: set[str] = field(default_factory=set)
    watch: Watch = field(default_factory=lambda: Watch(LIMITS.silence))


class World:
    """A fleet, and what is true whatever its rows say."""

    def __init__(self, database: Database, seed: int) -> None:
        self.database, self.chance = database, random.Random(seed)
        self.hosts = Hosts(database, seconds(AGENT_LEASE), seconds(POOL_LEASE))
        self.holder = ReservationHolder(database, seconds(POOL_LEASE))
        self.orders = OperatorCommands(database, lambda: None)
        entry = "[[models]]\nname = '{}'\nuse_cases = ['chat']\nsource = {{ path = '/m.gguf' }}\n{}\n"
        entries = "".join(entry.format(name, more) for name, (_, more) in MODELS.items())
        self.models = catalog.parse(entries, "catalog.toml").models
        self.configurations = {model.name: needs.configuration_id(model) for model in self.models}
        self.now = 0.0
        self.processes: dict[str, Process] = {}
        self.agents = {host: Agent(host) for host in HOSTS}
        self.cut: set[str] = set()
        #: By model, since when a step waits for it.
        self.waits: dict[str, float] = {}
        self.served: set[str] = set()
        #: Messages of the past that arrive once more, or for the first time.
        self.late: list[Callable[[], object]] = []
        #: What happened, for whoever reads a failure.
        self.story: list[str] = []
        with database.work() as work:
            work.run(text(_QUOTA))
        for agent in self.agents.values():
            self.agent_turns(agent)
        layouts = [
            KnownLayout(self.configurations[name], "L4", parts, "closed form", seconds(2), 10.0)
            for name, (parts, _) in MODELS.items()
        ]
        self.hosts.declare_layouts(layouts)

    # ---- what happens ----

    def steps_come(self) -> None:
        model = self.chance.choice(sorted(MODELS))
        self.waits.setdefault(model, self.now - self.chance.choice((0, 0, 50, 400)))

    def planner_turns(self) -> None:
        with self.database.work() as work:
            now = work.rows(text("SELECT now() AS now"))[0].now
        waiting = [
            Waiting(
                model,
                self.chance.choice(tuple(Priority)),
                1,
                now - seconds(self.now - since),
                namespace="team" if model == "a:1" else "",
                work=seconds(2),
            )
            for model, since in self.waits.items()
        ]
        usage = {model: {Priority.STANDARD: 0.05} for model in self.served}
        asked = FleetDemand(self.models, waiting, usage, {})
        done = reconcile.reconcile(self.database, lambda _: asked, TERMS)
        assert done is not None
        assert done.refused == {}, "nothing is planned that the ledger refuses"
        self.check()

    def some_agent_turns(self) -> None:
        self.agent_turns(self.agents[self.chance.choice(sorted(HOSTS))])

    def agent_turns(self, agent: Agent, *, may_die: bool = False) -> None:
        if not agent.alive or agent.host in self.cut:
            return
        try:
            if agent.epoch is None:
                self.agent_joins(agent)
            assert agent.epoch is not None
            pools = self.hosts.beat(agent.host, agent.epoch, [], list(self.configurations.values()), [])
            agent.watch.reached(BEGIN + seconds(self.now))
            for pool in pools:
                self.agent_acts(agent, agent.epoch, pool, may_die=may_die)
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
        devices = [Declared(id_, id_, "gpu", "L4", size, size) for id_, size in HOSTS[agent.host].items()]
        agent.epoch = self.hosts.join(agent.host, agent.host, 8, devices, adopted)
        agent.knows = set(adopted)

    def agent_acts(self, agent: Agent, epoch: int, pool: Granted, *, may_die: bool) -> None:
        process = self.processes.get(pool.id) if pool.id in agent.knows else None
        local = None
        if process is not None:
            asked, at = agent.asked.get(pool.id, (None, self.now))
            age, asked_ago = seconds(self.now - process.born), seconds(self.now - at)
            local = Local(process.alive, age, asked, asked_ago, agent.watch.lasted)
        match convergence.decide(pool, local, LIMITS):
            case Begin():
                self.hosts.activate(agent.host, epoch, pool.id, 1)
                if may_die and self.chance.random() < 0.2:
                    self.agent_dies(agent)  # bytes without a process
                    raise LeaseLost("it is gone")
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
            case GiveBack(reason=reason):
                assert process is None or not process.alive
                ended = PoolEnded(pool.id, None, pool.id not in agent.asked, reason, "")
                self.hosts.release(agent.host, epoch, ended)
                self.late.append(lambda: self.hosts.release(agent.host, epoch, ended))

    def some_process_goes_on(self) -> None:
        if living := [process for process in self.processes.values() if process.alive]:
            self.goes_on(self.chance.choice(living))

    def goes_on(self, process: Process) -> None:
        """One beat of a process, and what it does then."""
        if not process.alive or process.frozen or process.host in self.cut:
            return
        serves = process.phase is PoolPhase.SERVING and process.model in self.waits
        report = HeartbeatReport(process.phase, detail=process.detail, busy=int(serves))
        begun = self.now
        try:
            if process.phase is PoolPhase.STARTING:
                self.finds_out(process)
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

    def finds_out(self, process: Process) -> None:
        """It needs a little less or more than was reserved."""
        grant = self.holder.take(process.id, process.epoch)
        part = self.chance.choice((0.9, 1.0, 1.0, 1.05))
        wanted = {device: int(size * part) for device, size in process.bytes.items()}
        process.bytes = {device: min(size, wanted[device]) for device, size in process.bytes.items()}
        if self.chance.random() < 0.05:  # it never hears the answer, and gives up
            process.alive = False
            self.late.append(lambda: self.holder.adjust(grant, wanted))
            return
        if isinstance(refused := self.holder.adjust(grant, wanted), ReservationRefused):
            process.phase, process.detail = PoolPhase.REFUSED, refused.reason
        else:
            process.phase, process.bytes = PoolPhase.LOADING, wanted

    def time_passes(self) -> None:
        self.passes(self.chance.uniform(0.5, 10))

    def passes(self, age: float) -> None:
        with self.database.work() as work:
            for statement in _PASS:
                work.execute(statement, {"age": seconds(age)})
        self.now += age
        for process in self.processes.values():
            if not process.frozen and self.now - process.renewed > GONE:
                process.alive = False

    # ---- what goes wrong ----

    def process_dies(self) -> None:
        if living := [process for process in self.processes.values() if process.alive]:
            self.chance.choice(living).alive = False

    def process_is_frozen(self) -> None:
        if living := [process for process in self.processes.values() if process.alive]:
            self.chance.choice(living).frozen = True

    def processes_are_thawed(self) -> None:
        for process in self.processes.values():
            process.frozen = False
        self.passes(0.0)

    def some_agent_dies(self) -> None:
        self.agent_dies(self.agents[self.chance.choice(sorted(HOSTS))])

    def agent_dies(self, agent: Agent) -> None:
        agent.alive, agent.epoch = False, None
        agent.asked, agent.knows = {}, set()

    def agent_dies_in_the_middle(self) -> None:
        self.agent_turns(self.agents[self.chance.choice(sorted(HOSTS))], may_die=True)

    def agent_comes_back(self) -> None:
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

    def operator_orders(self) -> None:
        host, model = self.chance.choice(sorted(HOSTS)), self.chance.choice(sorted(MODELS))
        acts: list[Callable[[], object]] = [
            lambda: [self.orders.mark(one, HostState.SCHEDULABLE) for one in HOSTS],
            lambda: self.orders.mark(host, self.chance.choice((HostState.CORDONED, HostState.DRAINING))),
            lambda: self.orders.start(model),
            lambda: self.orders.stop_model(model),
        ]
        self.chance.choice(acts)()

    def who_is_old_tries(self) -> None:
        held = self.reservations()
        if not held:
            return
        one = self.chance.choice(list(held.values()))
        acts: list[Callable[[], object]] = [
            lambda: self.holder.renew(one.id, one.epoch - 1, HeartbeatReport(PoolPhase.SERVING)),
            lambda: self.holder.take(one.id, one.epoch - 1),
            lambda: self.hosts.activate(one.host, 0, one.id, 1),
            lambda: self.hosts.release(one.host, 0, PoolEnded(one.id, 0, failed=False, ending="", log_tail="")),
            lambda: self.hosts.beat(one.host, 0, [], [], []),
        ]
        for act in acts:
            with pytest.raises(LeaseLost):
                act()

    # ---- what is true ----

    def on(self, host: str) -> list[Process]:
        return [process for process in self.processes.values() if process.host == host and process.alive]

    def reservations(self) -> Mapping[str, Reservation]:
        with self.database.work() as work:
            return session.open_session(work, to_read=True).ledger.reservations

    def check(self) -> None:
        """No device is charged, or touched, beyond what it has; whatever lives is charged, or its host is out."""
        audit(self.database)
        lost = {seen.host.name for seen in views.hosts(self.database) if seen.host.state == HostState.LOST}
        held = self.reservations()
        touched = dict.fromkeys(CAPACITY, 0)
        for process in self.processes.values():
            if not process.alive:
                continue
            for device, size in process.bytes.items():
                touched[device] += size
            if process.host not in lost:
                one = held.get(process.id)
                assert one is not None, f"{process} lives and is charged nowhere"
                assert one.epoch == process.epoch
                assert all(size <= one.bytes[device] for device, size in process.bytes.items())
        assert all(size <= CAPACITY[device] for device, size in touched.items()), touched

    def heal(self) -> None:
        """From now on nothing goes wrong, but that one of what serves is frozen. What is frozen stays so."""
        serving = [one for one in self.processes.values() if one.phase is PoolPhase.SERVING and not one.frozen]
        for process in serving:
            self.goes_on(process)
        for process in [one for one in serving if one.alive][:1]:
            process.frozen = True
        self.cut.clear()
        self.late.clear()
        self.agent_comes_back()
        for host in HOSTS:
            self.orders.mark(host, HostState.SCHEDULABLE)
        self.passes(0.0)

    def all_go_on(self, age: float = 3.0) -> None:
        self.passes(age)
        for process in list(self.processes.values()):
            self.goes_on(process)
        for agent in self.agents.values():
            self.agent_turns(agent)
        self.planner_turns()

    def most_go_on(self) -> None:
        self.passes(self.chance.uniform(0.2, 2))
        turns: list[Callable[[], object]] = [self.planner_turns]
        turns += [partial(self.goes_on, process) for process in self.processes.values()]
        turns += [partial(self.agent_turns, agent) for agent in self.agents.values()]
        for turn in self.chance.sample(turns, k=max(len(turns) - self.chance.randrange(3), 1)):
            turn()


#: What happens, and how often beside the rest.
ACTS: Mapping[Callable[[World], None], int] = {
    World.most_go_on: 40,
    World.steps_come: 12,
    World.time_passes: 3,
    World.planner_turns: 2,
    World.some_agent_turns: 2,
    World.some_process_goes_on: 2,
    World.process_dies: 3,
    World.process_is_frozen: 2,
    World.processes_are_thawed: 1,
    World.some_agent_dies: 1,
    World.agent_dies_in_the_middle: 2,
    World.agent_comes_back: 3,
    World.host_is_cut_off: 1,
    World.hosts_are_connected: 2,
    World.message_comes_late: 5,
    World.operator_orders: 2,
    World.who_is_old_tries: 2,
}
_WEIGHTED = [act for act, weight in ACTS.items() for _ in range(weight)]

#: Acts of a history, and turns in which everybody is served once nothing goes wrong any more: quarantine is not over
#: by then, an operator ends it.
LENGTH, TURNS = 130, 150


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_no_byte_is_in_two_hands_and_everybody_is_served(database: Database, seed: int) -> None:
    """Plans, crashes, frozen processes, hosts that are cut off, expiries, late messages, adoptions, orders."""
    world = World(database, seed)
    for _ in range(LENGTH):
        act = world.chance.choice(_WEIGHTED)
        world.story.append(act.__name__)
        act(world)
        world.check()

    world.heal()
    for model in MODELS:
        world.waits.setdefault(model, world.now)
    for turn in range(TURNS):
        world.all_go_on()
        if world.waits.keys() <= {TOO_LARGE}:
            break
        if turn == TURNS // 2:
            for model in world.waits.keys() - {TOO_LARGE}:
                world.orders.start(model)
    for _ in range(25):  # what is frozen is silent for longer than its lease, and then its agent ends it
        world.all_go_on()
    living = {process.id for process in world.processes.values() if process.alive}
    assert not [process for process in world.processes.values() if process.alive and process.frozen]
    assert living == world.reservations().keys(), "ledger and processes agree"
    refused = {row.model: row.reason for row in views.fleet(database).refusals}
    assert world.waits.keys() <= {TOO_LARGE}, (world.waits, refused)
    assert refused[TOO_LARGE].startswith("needs 4.9 KiB on one device, and the largest")
