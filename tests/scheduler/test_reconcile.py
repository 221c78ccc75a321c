"""Reconcile on the real Postgres: observe, plan and apply; the test acts as the agents and the pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import pytest
from sqlalchemy import text

from app.access.accounts import NamespaceLimits
from app.catalog import catalog
from app.fleet import views
from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.host import HostState
from app.fleet.hosts import AssignedPool, Hosts, PoolEnded, not_served
from app.fleet.ledger import rules, session
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase, PoolState
from app.fleet.views import PoolView
from app.footprint.layout import KnownLayout
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, LeaseLost, NotFound
from app.kernel.priority import Priority
from app.scheduler import needs, reconcile
from app.scheduler.arrival_patterns import LastRequest
from app.scheduler.needs import OperatorTarget
from app.scheduler.observation import FleetDemand, InFlight
from app.scheduler.operator_commands import OperatorCommands
from app.scheduler.planner.cluster import Cluster
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.plan import Action, StartPool
from app.scheduler.reconcile_pass import ReconcilePass, ReconcileTimes
from tests.fleet.granting import LEASE, device_report

ENTRY = """
[[models]]
name = "{name}"
use_cases = ["chat"]
source = {{ path = "/{name}.gguf" }}
{more}
"""
A, B = "a:1", "b:1"
SIZE = 1000
TIMES = ReconcileTimes(hold=timedelta(seconds=30), drain=timedelta(seconds=20), lost_after=timedelta(minutes=2))


def entries(**more: str) -> catalog.Catalog:
    text_ = "".join(ENTRY.format(name=name, more=more.get(name[0], "")) for name in (A, B))
    return catalog.parse(text_, "catalog.toml")


@dataclass
class Scene:
    """Hosts with one device each, which holds one model; the test acts as their agents and pools."""

    database: Database
    hosts: Hosts
    holder: ReservationHolder
    commands: OperatorCommands
    demand: FleetDemand
    agents: dict[str, int]

    def wait(
        self, *models: str, seconds: float = 60, priority: Priority = Priority.STANDARD, namespace: str = ""
    ) -> None:
        """Let a step of each model wait since so many seconds."""
        since = self.now() - timedelta(seconds=seconds)
        waiting = [WaitingSteps(model, priority, 1, since, namespace=namespace) for model in models]
        self.demand = replace(self.demand, waiting=waiting)

    def pass_time(self, seconds: float) -> None:
        """Let time pass for the accounts of namespaces."""
        passed = "UPDATE quota SET counted_at = counted_at - :p, period_began = period_began - :p"
        with self.database.work() as work:
            work.run(text(passed), {"p": timedelta(seconds=seconds)})

    def now(self) -> datetime:
        with self.database.work() as work:
            now: datetime = work.rows(text("SELECT now() AS now"))[0].now
            return now

    def reconcile(self) -> None:
        assert reconcile.reconcile(self.database, lambda _: self.demand, TIMES) is not None
        with self.database.work() as work:
            assert rules.problems(session.open_session(work, to_read=True).ledger) == []

    def pools(self, model: str | None = None, *, ended: bool = False) -> Sequence[PoolView]:
        return views.pools(self.database, model=model, ended=ended)

    def granted(self, host: str = "h") -> list[AssignedPool]:
        return self.hosts.pools(host)

    def begin(self, host: str = "h") -> AssignedPool:
        """Act as the agent and the pool: the first pool that may begin serves."""
        pool = next(one for one in self.granted(host) if one.state is ReservationState.HELD and not one.waits)
        self.hosts.activate(host, self.agents[host], pool.id, 1)
        self.report(pool, PoolPhase.SERVING)
        return pool

    def report(self, pool: AssignedPool, phase: PoolPhase, busy: int = 0) -> Desired:
        return self.holder.renew(pool.id, pool.epoch, HeartbeatReport(phase, busy=busy)).desired

    def end(self, pool: AssignedPool, host: str = "h", *, failed: bool = False) -> None:
        self.hosts.release(host, self.agents[host], PoolEnded(pool.id, 0, failed, "it ended", ""))

    def refusals(self) -> dict[str, str]:
        return {row.model: row.reason for row in views.fleet(self.database).refusals}


@pytest.fixture
def scene(database: Database) -> Scene:
    hosts = Hosts(database, LEASE, LEASE)
    made = Scene(
        database,
        hosts,
        ReservationHolder(database, LEASE),
        OperatorCommands(database, lambda: None),
        FleetDemand(entries().models, [], {}, {}),
        {},
    )
    add_host(made, "h")
    return made


def add_host(scene: Scene, name: str) -> None:
    device = device_report(f"{name}-gpu", "gpu-0", total=SIZE)
    scene.agents[name] = scene.hosts.join(name, name, 8, [device], {})
    ids = [needs.configuration_id(model) for model in scene.demand.models]
    scene.hosts.declare_layouts(
        KnownLayout(id_, "L4", (600,), "closed form", timedelta(seconds=1), 10.0) for id_ in ids
    )
    scene.hosts.heartbeat(name, scene.agents[name], [], ids, [])


def test_a_model_with_demand_is_granted_and_served(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    (pool,) = scene.pools()
    assert (pool.model, pool.state, pool.devices) == (A, PoolState.STARTING, ["gpu-0"])
    assert "1 step waits" in pool.reason

    scene.begin()
    scene.reconcile()
    assert [one.state for one in scene.pools()] == [PoolState.SERVING], "one is enough"


def test_an_evicted_pool_makes_room_once_its_process_is_gone(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    first = scene.begin()
    scene.wait(B)
    scene.reconcile()
    waiting, leaving = scene.granted()[1], scene.granted()[0]
    assert (leaving.desired, waiting.waits) == (Desired.DRAIN, True)
    assert scene.report(first, PoolPhase.DRAINING) is Desired.DRAIN
    scene.reconcile()
    assert len(scene.granted()) == 2, "nothing more is planned meanwhile"

    scene.end(first)
    assert scene.begin().model == B
    assert [one.model for one in scene.pools()] == [B]


def test_a_grant_that_no_agent_begins_is_released_and_planned_again(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    with scene.database.work() as work:
        work.run(text("UPDATE reservation SET lease_until = now() - interval '1 s'"))
    scene.reconcile()

    old = scene.pools(ended=True)[-1]
    assert (old.state, old.ending) == (None, "no agent began it in time")
    assert len(scene.granted()) == 1


def test_a_silent_host_is_lost_and_its_models_are_placed_elsewhere(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    first = scene.begin()
    add_host(scene, "i")
    with scene.database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 min' WHERE name = 'h'"))
        work.run(text("UPDATE pool_report SET heartbeat_at = now() - interval '2 min'"))
    scene.reconcile()
    assert scene.granted("i"), "its bytes are not waited for"
    assert views.hosts(scene.database)[0].devices[0].reserved == 600, "its bytes are not granted"

    with scene.database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 h' WHERE name = 'h'"))
        work.run(text("UPDATE reservation SET lease_until = now() - interval '1 s' WHERE host = 'h'"))
    scene.reconcile()
    assert views.hosts(scene.database)[0].state == HostState.LOST
    assert scene.granted("h") == []
    assert scene.pools(ended=True)[-1].id == first.id


@pytest.mark.parametrize("expected", [timedelta(minutes=1), timedelta(0)])
def test_steps_of_a_lower_class_are_preempted_when_they_take_long(scene: Scene, expected: timedelta) -> None:
    """At once where the drain is expected to take too long; else once it has taken too long."""
    scene.wait(A)
    scene.reconcile()
    pool = scene.begin()
    working = HeartbeatReport(PoolPhase.SERVING, worker="pool.a", busy=1, urgent=Priority.BATCH)
    with scene.database.work() as work:
        work.run(text("UPDATE pool_report SET serving_at = now() - interval '1 h'"))
    scene.holder.renew(pool.id, pool.epoch, working)
    scene.wait(B, seconds=19, priority=Priority.INTERACTIVE)
    scene.demand = replace(scene.demand, in_flight={"pool.a": InFlight(expected)})
    scene.reconcile()
    if not expected:
        assert scene.holder.renew(pool.id, pool.epoch, working).desired is Desired.DRAIN
        with scene.database.work() as work:
            work.run(text("UPDATE pool SET stop_at = now() - interval '11 s' WHERE stop_at IS NOT NULL"))
        scene.reconcile()

    assert scene.holder.renew(pool.id, pool.epoch, working).desired is Desired.PREEMPT


def test_commands_to_start_and_stop_are_carried_out_once(scene: Scene) -> None:
    scene.commands.start(A)
    scene.reconcile()
    pool = scene.begin()
    scene.reconcile()
    assert len(scene.granted()) == 1

    assert scene.commands.stop(pool.id[-6:]) == pool.id
    scene.reconcile()
    assert scene.granted()[0].desired is Desired.DRAIN
    scene.end(pool)
    scene.reconcile()
    assert scene.granted() == []
    with pytest.raises(Conflict, match="has ended already: it ended"):
        scene.commands.stop(pool.id)
    with pytest.raises(NotFound):
        scene.commands.stop("nothing")


def test_a_commanded_start_waits_for_room_without_demand(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    first = scene.begin()
    scene.wait()
    scene.commands.start(B)
    for _ in range(3):
        scene.reconcile()
        assert [one.waits for one in scene.granted()] == [False, True]
    scene.end(first)
    assert scene.begin().model == B
    scene.reconcile()
    assert [one.reason.startswith("an operator wants it") for one in scene.pools(B)] == [True]


def test_a_model_that_is_kept_running_stays_until_it_is_stopped(scene: Scene) -> None:
    scene.commands.start(A, pinned=True)
    scene.reconcile()
    pool = scene.begin()
    scene.wait(B, seconds=600, priority=Priority.INTERACTIVE)
    scene.reconcile()
    assert [one.model for one in scene.granted()] == [A], "it is pinned"
    assert B in scene.refusals()

    scene.end(pool, failed=True)
    scene.commands.stop_model(A)
    scene.reconcile()
    assert [one.model for one in scene.granted()] == [B]
    assert scene.refusals() == {}


def test_the_settings_keep_models_running(scene: Scene) -> None:
    scene.demand = replace(scene.demand, targets={A: OperatorTarget(1, pinned=True)})
    scene.reconcile()
    assert [(one.model, one.pinned) for one in scene.pools()] == [(A, True)]


def test_idle_replicas_of_a_model_of_the_settings_leave(scene: Scene) -> None:
    add_host(scene, "i")
    scene.demand = replace(scene.demand, targets={A: OperatorTarget(1, pinned=True)})
    scene.reconcile()
    kept = scene.begin(scene.pools()[0].host)
    steps, since = 400, scene.now() - timedelta(seconds=60)
    scene.demand = replace(scene.demand, waiting=[WaitingSteps(A, Priority.STANDARD, steps, since)])
    scene.reconcile()
    assert sorted(one.pinned for one in scene.pools()) == [False, True]
    (surplus,) = (one for one in scene.pools() if one.id != kept.id)
    scene.begin(surplus.host)
    scene.demand = replace(scene.demand, waiting=[])
    scene.reconcile()
    assert [one.desired for one in scene.pools()] == [Desired.RUN, Desired.RUN]

    with scene.database.work() as work:
        work.run(text("UPDATE pool_report SET serving_at = now() - interval '2 min', last_used_at = NULL"))
    scene.reconcile()
    assert {one.id: one.desired for one in scene.pools()} == {kept.id: Desired.RUN, surplus.id: Desired.DRAIN}


def test_a_pool_whose_entry_has_changed_is_stopped(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    scene.begin()
    scene.demand = replace(scene.demand, models=entries(a="context = 512").models, waiting=[])
    scene.reconcile()
    assert scene.granted()[0].stop_reason == "its entry in the catalogue has changed"


def test_a_model_that_is_in_no_catalogue_is_refused_by_name(scene: Scene) -> None:
    scene.wait("c:1")
    scene.reconcile()
    assert "not in the catalogue" in scene.refusals()["c:1"]


def test_refusals_are_stored_together_and_keep_the_time_since_which_they_hold(scene: Scene) -> None:
    scene.commands.mark("h", HostState.CORDONED)
    scene.wait("d:1", "c:1", A)
    scene.reconcile()
    before = {row.model: row for row in views.fleet(scene.database).refusals}
    assert before.keys() == {"d:1", "c:1", A}
    assert before[A].needs > 0
    assert before["c:1"].estimate_s is None

    scene.wait("c:1", A)
    scene.reconcile()
    after = {row.model: row for row in views.fleet(scene.database).refusals}
    assert {model: row.since for model, row in after.items()} == {"c:1": before["c:1"].since, A: before[A].since}


def test_a_model_that_fails_on_a_host_backs_off_there(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    scene.end(scene.begin(), failed=True)
    scene.reconcile()
    assert scene.granted() == []
    assert "failed" in scene.refusals()[A]

    scene.commands.start(A)
    scene.reconcile()
    assert len(scene.granted()) == 1, "an operator wants it tried again"


def test_nothing_is_placed_on_a_host_that_is_cordoned(scene: Scene) -> None:
    scene.commands.mark("h", HostState.CORDONED)
    scene.wait(A)
    scene.reconcile()
    assert scene.granted() == []
    scene.commands.mark("h", HostState.SCHEDULABLE)
    scene.reconcile()
    assert len(scene.granted()) == 1
    with pytest.raises(NotFound, match="there are: h"):
        scene.commands.mark("g", HostState.SCHEDULABLE)


def test_the_state_that_operators_set_outlasts_the_loss_of_a_host(scene: Scene) -> None:
    scene.commands.mark("h", HostState.CORDONED)
    with scene.database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 h'"))
    scene.reconcile()
    assert views.hosts(scene.database)[0].state == HostState.LOST
    with pytest.raises(LeaseLost):
        scene.hosts.heartbeat("h", scene.agents["h"], [], [], [])

    add_host(scene, "h")
    assert views.hosts(scene.database)[0].state == HostState.CORDONED


def test_a_host_is_removed_only_without_an_agent_and_reservations(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    with pytest.raises(Conflict, match="stop it first"):
        scene.commands.remove("h")
    scene.hosts.leave("h", scene.agents["h"])
    with pytest.raises(Conflict, match="--lost"):
        scene.commands.remove("h")
    scene.commands.remove("h", lost=True)
    assert views.hosts(scene.database) == []


def test_a_namespace_holds_no_more_than_its_quota(scene: Scene) -> None:
    scene.commands.limit("team", NamespaceLimits(max_bytes=100))
    scene.wait(A, namespace="team")
    scene.reconcile()
    assert scene.granted() == []
    assert A in scene.refusals()

    scene.commands.limit("team", NamespaceLimits(max_bytes=600))
    scene.reconcile()
    assert len(scene.granted()) == 1


def test_a_namespace_without_device_seconds_gets_no_pool_before_the_next_period(scene: Scene) -> None:
    scene.commands.limit("team", NamespaceLimits(max_device_time=timedelta(seconds=10), period=timedelta(hours=1)))
    scene.wait(A, namespace="team")
    scene.reconcile()
    pool = scene.begin()
    scene.pass_time(20)
    scene.reconcile()
    scene.end(pool)

    scene.wait(B, namespace="team")
    scene.reconcile()
    assert scene.granted() == []
    assert "namespace team has used up its device seconds; the next period begins in 60 min" in scene.refusals()[B]
    scene.pass_time(3600)
    scene.reconcile()
    scene.reconcile()
    assert [one.model for one in scene.granted()] == [B]


def test_a_namespace_below_its_share_is_served_before_one_above(scene: Scene) -> None:
    """Both wait for the same time, and one device holds one model."""
    scene.wait(A, namespace="heavy")
    scene.reconcile()
    pool = scene.begin()
    scene.pass_time(60)
    scene.reconcile()
    scene.end(pool)
    since = scene.now() - timedelta(seconds=30)
    both = [WaitingSteps(A, Priority.STANDARD, 1, since, namespace="heavy")]
    scene.demand = replace(
        scene.demand, waiting=[*both, WaitingSteps(B, Priority.STANDARD, 1, since, namespace="light")]
    )
    scene.reconcile()
    assert [one.model for one in scene.granted()] == [B]


def test_an_explanation_changes_nothing_and_says_what_a_pass_would_do(scene: Scene) -> None:
    scene.wait(A)
    found = reconcile.explain(scene.database, scene.demand, [A])[A]
    assert (found.condition, found.waiting) == ("coming", 1)
    assert scene.granted() == []


def test_of_two_workers_one_reconciles_and_only_it_reads_the_demand(scene: Scene) -> None:
    def read_demand(_: UnitOfWork) -> FleetDemand:
        raise AssertionError("another worker plans")

    with scene.database.work() as work:
        work.run(text("SELECT pg_advisory_xact_lock(:key)"), {"key": reconcile._LEADER})
        assert reconcile.reconcile(scene.database, read_demand, TIMES) is None


@pytest.mark.parametrize(
    "bad",
    [
        "UPDATE layout SET parts = '[]'",
        "UPDATE layout SET parts = '[\"x\"]'",
        "UPDATE layout SET parts = 'null'",
        "UPDATE layout SET parts = '[-5]'",
        "UPDATE layout SET load_seconds = 'NaN'",
        "UPDATE layout SET load_seconds = 'Infinity'",
        "UPDATE layout SET tokens_per_second = 0",
        "UPDATE layout SET tokens_per_second = 'NaN'",
    ],
)
def test_an_invalid_layout_stops_no_other_model(scene: Scene, bad: str) -> None:
    with scene.database.work() as work:
        id_ = needs.configuration_id(scene.demand.models[0])
        work.run(text(f"{bad} WHERE configuration = :id"), {"id": id_})
    scene.wait(A, B)
    scene.reconcile()
    assert [pool.model for pool in scene.pools()] == [B]
    assert scene.refusals().keys() == {A}
    reconcile.defragment(scene.database, lambda _: scene.demand, TIMES)
    assert reconcile.explain(scene.database, scene.demand, [B])[B]


@pytest.mark.parametrize("bad", ["estimate_seconds = 'NaN'", "estimate_seconds = 'Infinity'"])
def test_an_invalid_row_of_a_pool_stops_no_other(scene: Scene, bad: str) -> None:
    """Its bytes stay charged, so that nothing is granted that does not fit."""
    scene.wait(A)
    scene.reconcile()
    add_host(scene, "i")
    with scene.database.work() as work:
        work.run(text(f"UPDATE pool SET {bad}"))
    scene.wait(B)
    scene.reconcile()
    scene.reconcile()
    assert {pool.model for pool in scene.pools()} == {A, B}
    assert {pool.host for pool in scene.pools(B)} == {"i"}


def test_an_invalid_row_of_a_device_stops_no_other(scene: Scene) -> None:
    scene.wait(A)
    scene.reconcile()
    add_host(scene, "i")
    with scene.database.work() as work:
        work.run(text("UPDATE device SET speed = 'NaN' WHERE host = 'h'"))
    scene.wait(A, B)
    scene.reconcile()
    assert {pool.host for pool in scene.pools(B)} <= {"i"}
    assert scene.pools(B)


def test_a_namespace_without_use_for_months_stops_nothing(scene: Scene) -> None:
    scene.commands.limit("team", NamespaceLimits(max_bytes=10**9))
    for attained in (1e-320, 5.0):
        with scene.database.work() as work:
            rested = "UPDATE quota SET attained_seconds = :a, counted_at = now() - interval '400 days'"
            work.run(text(rested), {"a": attained})
        scene.wait(A)
        scene.reconcile()
    assert scene.pools(A)


def test_an_action_that_raises_is_refused_with_its_reason(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a pool that ended after it was observed."""
    done = ReconcilePass.apply

    def breaks(pass_: ReconcilePass, cluster: Cluster, action: Action) -> None:
        if isinstance(action, StartPool) and action.configuration.startswith("a-1"):
            raise StopIteration
        done(pass_, cluster, action)

    monkeypatch.setattr(ReconcilePass, "apply", breaks)
    add_host(scene, "i")
    scene.wait(A, B)
    scene.reconcile()
    assert [pool.model for pool in scene.pools()] == [B]
    assert "could not be granted: StopIteration" in scene.refusals()[A]


def test_a_refusal_says_why_a_host_does_not_serve_the_file(scene: Scene) -> None:
    ids = [needs.configuration_id(scene.demand.models[1])]
    scene.hosts.heartbeat("h", scene.agents["h"], [], ids, [not_served(A, "its tokens 0 and 1 are the same")])
    scene.wait(A)
    scene.reconcile()
    reason = "no host can use its file: on h, its tokens 0 and 1 are the same"
    assert scene.refusals()[A] == reason


def test_a_model_that_is_requested_every_ten_minutes_is_loaded_before_the_next_time(scene: Scene) -> None:
    """The last gaps are stored by the passes; none of them sees more than one request."""
    gaps = [600 + 2 * number for number in range(16)]
    at = scene.now() - timedelta(seconds=sum(gaps) + 601)
    for gap in (0, *gaps):
        at += timedelta(seconds=gap)
        scene.demand = replace(scene.demand, requests={A: LastRequest(at, Priority.INTERACTIVE)})
        scene.reconcile()

    (pool,) = scene.pools()
    assert (pool.model, pool.reason) == (
        A,
        "it is requested about every 10 min, and was last 10 min ago: 600 B on gpu-0, which is free",
    )
