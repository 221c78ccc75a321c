"""
Faults of the fleet: agents, pools, control workers and the broker are killed during loads, drains and work.

Reservations and processes match again within the lease, no byte is used by two pools meanwhile, and every run ends.
Devices are simulated where no real model is needed; agents, pools, ledger and scheduler are real.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta

import pytest

from app.catalog import files
from app.fleet import views
from app.fleet.host import HostState
from app.fleet.pool import Desired
from app.fleet.views import PoolView
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.state_machine.states import RunState
from tests.faults import fleet_chaos
from tests.faults.conftest import MODEL, RUNS, Cluster, until
from tests.faults.fleets import (
    ALPHA,
    ENDLESS,
    ONE_DEVICE,
    assert_consistent,
    complete,
    is_alive,
    kill,
    ledger_matches_processes,
    pools,
    serving,
    submit_generate,
    until_done,
    until_ended,
    with_models,
)


@pytest.fixture
def fleet(cluster: Cluster) -> Cluster:
    """A cluster with the models, a control worker and a beat, but without an agent."""
    with_models(cluster)
    cluster.control()
    cluster.beat()
    return cluster


@pytest.mark.storm
def test_hanging_pools_are_killed_and_operator_commands_are_executed(fleet: Cluster) -> None:
    """Pools that never begin to serve, that survive their agent, and that an operator restarts and stops."""
    # Short, but longer than the start of a pool on a busy machine.
    short = fleet.settings.pools.model_copy(update={"start_timeout": timedelta(seconds=20)})
    agent = fleet.agent(changes={"pools": short}, simulated=ONE_DEVICE)
    assert agent.ready()
    endless = submit_generate(fleet, ENDLESS)
    loading = until(lambda: next((p for p in pools(fleet, ENDLESS) if p.phase == "loading"), None))
    assert until_ended(fleet, loading).ending.startswith("it did not begin to serve within")
    assert "pool_phase" in views.log_tail(fleet.database, loading.id)
    refusal = until(lambda: next(iter(views.fleet(fleet.database).refusals), None))
    assert (refusal.model, "on agent, it failed once" in refusal.reason) == (ENDLESS, True)
    fleet.runs.cancel(endless)

    run_id = submit_generate(fleet, ALPHA)
    until_done(fleet, [run_id])
    first = until(lambda: serving(fleet, ALPHA))
    agent.kill("SIGKILL")
    assert is_alive(first.pid), "it continues without its agent"
    agent.restart()
    until(lambda: b"pool_adopted" in agent.container.log())
    run_ids = [run_id, submit_generate(fleet, ALPHA)]
    until(lambda: fleet.state(run_ids[1]) == RunState.SUCCEEDED)
    assert [pool.id for pool in pools(fleet)] == [first.id], "it was adopted, and continued to serve"

    commands = OperatorCommands(fleet.database, lambda: None)
    commands.stop(first.id, again=True)
    assert until_ended(fleet, first).ending == "restarted by an operator"
    second = until(lambda: serving(fleet, ALPHA))
    commands.stop_model(ALPHA)
    assert not until_ended(fleet, second).failed
    until(lambda: ledger_matches_processes(fleet))
    assert_consistent(fleet)


def test_steps_of_a_dead_pool_are_requeued_before_their_leases_expire(cluster: Cluster) -> None:
    """
    The steps of a pool that its agent sees dead are executed again immediately: after a kill of the pool, after a kill
    of pool and agent, and for a frozen pool, which its agent kills. No lease is near its end.
    """
    long = timedelta(minutes=5)
    fleet = cluster.settings.fleet.model_copy(update={"lease": long, "heartbeat_timeout": timedelta(seconds=3)})
    runs = RUNS.model_copy(update={"lease": long})
    cluster.settings = cluster.settings.model_copy(update={"runs": runs, "fleet": fleet})
    with_models(cluster)
    cluster.control()
    cluster.beat()
    agent = cluster.agent(simulated=ONE_DEVICE)
    assert agent.ready()

    def ended(end: Callable[[PoolView], object]) -> str:
        """End a pool by `end` during a step, wait for the step, and return the agent's description of the end."""
        run_id = submit_generate(cluster, ALPHA, 60)
        until(lambda: cluster.is_held(run_id))
        pool = until(lambda: serving(cluster, ALPHA))
        end(pool)
        ending: str = until_ended(cluster, pool).ending
        until_done(cluster, [run_id])
        assert cluster.outcomes(run_id) == ["worker_lost", "succeeded"]
        return ending

    def both(pool: PoolView) -> None:
        agent.kill("SIGKILL")
        kill(pool.pid)
        agent.restart()

    assert "SIGKILL" in ended(lambda pool: kill(pool.pid))
    assert "gone" in ended(both)
    assert "sent no heartbeat" in ended(lambda pool: kill(pool.pid, signal.SIGSTOP))
    until(lambda: ledger_matches_processes(cluster))
    assert_consistent(cluster)


def test_hosts_are_drained_and_removed(fleet: Cluster) -> None:
    """A pool of a drained host is started on another host; after the end of its agent the host can be removed."""
    for name in ("west", "east"):
        assert fleet.agent(name, simulated=ONE_DEVICE).ready()
    commands = OperatorCommands(fleet.database, lambda: None)
    run_ids = [submit_generate(fleet, ALPHA, 100)]
    drained = until(lambda: next((pool for pool in pools(fleet) if pool.busy), None))
    commands.mark(drained.host, HostState.DRAINING)
    until(lambda: pools(fleet, ended=True)[-1].desired == Desired.DRAIN)
    run_ids.append(submit_generate(fleet, ALPHA))
    assert until_ended(fleet, drained).failed is False
    until_done(fleet, run_ids)
    assert fleet.outcomes(run_ids[0])[-1] == "succeeded"
    assert {pool.host for pool in pools(fleet)} == {"west", "east"} - {drained.host}

    fleet.nodes[drained.host].kill("SIGTERM")
    until(lambda: not fleet.nodes[drained.host].container.child.alive)
    commands.remove(drained.host)
    assert [seen.name for seen in views.hosts(fleet.database)] == [pools(fleet)[0].host]
    until(lambda: ledger_matches_processes(fleet))
    assert_consistent(fleet)


@pytest.mark.storm
def test_random_kills_lose_nothing(cluster: Cluster) -> None:
    """Kills of pools, agents, control worker and broker during loads, drains and work; the ledger is watched."""
    fleet_chaos.tolerate_kills(with_models(cluster), lease=20)
    cluster.control()
    cluster.beat()
    result = fleet_chaos.kill_at_random(cluster, 7, seed=3, every=4)
    assert {kill.partition(",")[0] for kill in result.kills} == {
        "pool",
        "agent",
        "agent and pool",
        "control worker",
        "broker",
    }
    assert any(pool.failed for pool in pools(cluster, ended=True))


@pytest.mark.storm
def test_real_models_alternate_within_a_limit_of_memory(fleet: Cluster) -> None:
    """SmolLM2 and Gemma; the RAM for pools fits one of them at a time."""
    gemma = "gemma3:270m"
    files.pull(files.read_catalog().get(gemma), fleet.directory / "agent")
    assert fleet.agent(ram=1500 * 2**20).ready()
    run_ids = []
    for model in (MODEL, gemma, MODEL):
        run_ids.append(fleet.submit(complete(model)))
        until_done(fleet, run_ids)
        assert_consistent(fleet)
        (pool,) = pools(fleet)
        used, reserved = sum(pool.peak.values()), sum(pool.bytes.values())
        assert pool.model == model
        assert used <= reserved, f"{model} used {used} of {reserved}"

    assert len(pools(fleet, ended=True)) == 3
    assert fleet.state(run_ids[-1]) == RunState.SUCCEEDED

    kill(pool.pid)
    ended = until_ended(fleet, pool)
    assert ended.failed
    assert ended.ending == "it was ended by SIGKILL, as the kernel does when memory runs out"
