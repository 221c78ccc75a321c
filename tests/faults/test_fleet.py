"""
The fleet under fire: agents, pools, control workers and the broker die in the middle of loads and drains.

What is reserved and what runs agree again within the lease, no byte is in two hands meanwhile, and every run ends.
Devices are simulated where no model is needed; agents, pools, ledger and planner are the real ones.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta

import pytest

from app.catalog import files
from app.fleet import views
from app.fleet.pool import Desired
from app.fleet.rows import HostState
from app.fleet.views import PoolView
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.state_machine.states import RunState
from tests.faults import storm
from tests.faults.conftest import MODEL, RUNS, Stage, until
from tests.faults.fleets import (
    ALPHA,
    ENDLESS,
    ONE_DEVICE,
    agree,
    ask,
    assert_sound,
    complete,
    kill,
    lives,
    pools,
    serving,
    until_done,
    until_ended,
    with_models,
)


@pytest.fixture
def fleet(stage: Stage) -> Stage:
    """A stage that knows the models, with a control worker and a beat; no agent yet."""
    with_models(stage)
    stage.control()
    stage.beat()
    return stage


def test_what_hangs_is_ended_and_what_is_ordered_is_done(fleet: Stage) -> None:
    """Pools that never begin to serve, are frozen in the middle of their work, outlive their agent, are restarted."""
    # Short, and yet longer than a busy machine takes to start a pool.
    short = fleet.settings.pools.model_copy(update={"start_timeout": timedelta(seconds=20)})
    agent = fleet.agent(changes={"pools": short}, simulated=ONE_DEVICE)
    assert agent.ready()
    endless = ask(fleet, ENDLESS)
    loading = until(lambda: next((p for p in pools(fleet, ENDLESS) if p.phase == "loading"), None))
    assert until_ended(fleet, loading).ending.startswith("it did not begin to serve within")
    assert "pool_phase" in views.log_tail(fleet.database, loading.id)
    refusal = until(lambda: next(iter(views.fleet(fleet.database).refusals), None))
    assert (refusal.model, "failed once on agent" in refusal.reason) == (ENDLESS, True)
    fleet.runs.cancel(endless)

    run_id = ask(fleet, ALPHA)
    until_done(fleet, [run_id])
    first = until(lambda: serving(fleet, ALPHA))
    agent.kill("SIGKILL")
    assert lives(first.pid), "it goes on without its agent"
    agent.restart()
    until(lambda: b"pool_adopted" in agent.container.log())
    run_ids = [run_id, ask(fleet, ALPHA)]
    until(lambda: fleet.state(run_ids[1]) == RunState.SUCCEEDED)
    assert [pool.id for pool in pools(fleet)] == [first.id], "it was adopted, and served on"

    orders = OperatorCommands(fleet.database, lambda: None)
    orders.stop(first.id, again=True)
    assert until_ended(fleet, first).ending == "restarted by an operator"
    second = until(lambda: serving(fleet, ALPHA))
    orders.stop_model(ALPHA)
    assert not until_ended(fleet, second).failed
    until(lambda: agree(fleet))
    assert_sound(fleet)


def test_steps_of_a_dead_pool_do_not_wait_for_their_leases(stage: Stage) -> None:
    """
    What a pool held that its agent sees dead is done again at once: one that was killed, one that died with its agent,
    and one that was frozen, which its agent kills. Neither lease comes near its end.
    """
    long = timedelta(minutes=5)
    fleet = stage.settings.fleet.model_copy(update={"lease": long, "heartbeat_timeout": timedelta(seconds=3)})
    stage.settings = stage.settings.model_copy(update={"runs": RUNS.model_copy(update={"lease": long}), "fleet": fleet})
    with_models(stage)
    stage.control()
    stage.beat()
    agent = stage.agent(simulated=ONE_DEVICE)
    assert agent.ready()

    def ended(end: Callable[[PoolView], object]) -> str:
        """A pool is ended by `end` in the middle of a step, which then ends elsewhere; gives how its agent saw that."""
        run_id = ask(stage, ALPHA, 60)
        until(lambda: stage.is_held(run_id))
        pool = until(lambda: serving(stage, ALPHA))
        end(pool)
        ending: str = until_ended(stage, pool).ending
        until_done(stage, [run_id])
        assert stage.outcomes(run_id) == ["worker_lost", "succeeded"]
        return ending

    def both(pool: PoolView) -> None:
        agent.kill("SIGKILL")
        kill(pool.pid)
        agent.restart()

    assert "SIGKILL" in ended(lambda pool: kill(pool.pid))
    assert "gone" in ended(both)
    assert "was silent" in ended(lambda pool: kill(pool.pid, signal.SIGSTOP))
    until(lambda: agree(stage))
    assert_sound(stage)


def test_hosts_are_drained_and_forgotten(fleet: Stage) -> None:
    """What works on a host that is drained is started elsewhere; an agent that ends leaves nothing to remove."""
    for name in ("west", "east"):
        assert fleet.agent(name, simulated=ONE_DEVICE).ready()
    orders = OperatorCommands(fleet.database, lambda: None)
    run_ids = [ask(fleet, ALPHA, 100)]
    drained = until(lambda: next((pool for pool in pools(fleet) if pool.busy), None))
    orders.mark(drained.host, HostState.DRAINING)
    until(lambda: pools(fleet, ended=True)[-1].desired == Desired.DRAIN)
    run_ids.append(ask(fleet, ALPHA))
    assert until_ended(fleet, drained).failed is False
    until_done(fleet, run_ids)
    assert fleet.outcomes(run_ids[0])[-1] == "succeeded"
    assert {pool.host for pool in pools(fleet)} == {"west", "east"} - {drained.host}

    fleet.nodes[drained.host].kill("SIGTERM")
    until(lambda: not fleet.nodes[drained.host].container.child.alive)
    orders.remove(drained.host)
    assert [seen.name for seen in views.hosts(fleet.database)] == [pools(fleet)[0].host]
    until(lambda: agree(fleet))
    assert_sound(fleet)


def test_a_storm_of_kills_loses_nothing(stage: Stage) -> None:
    """Pools, agents, control worker and broker, each while pools load, drain and work; looked at all the time."""
    storm.patient(with_models(stage), lease=20)
    stage.control()
    stage.beat()
    done = storm.kills(stage, 7, seed=3, every=4)
    assert {way.partition(",")[0] for way in done.kills} == {
        "pool",
        "agent",
        "agent and pool",
        "control worker",
        "broker",
    }
    assert any(pool.failed for pool in pools(stage, ended=True))


def test_real_models_take_turns_under_a_budget_of_memory(fleet: Stage) -> None:
    """SmolLM2 and Gemma, of which the RAM that pools may have holds one at a time."""
    gemma = "gemma3:270m"
    files.pull(files.read_catalog().get(gemma), fleet.directory / "agent")
    assert fleet.agent(ram=1500 * 2**20).ready()
    run_ids = []
    for model in (MODEL, gemma, MODEL):
        run_ids.append(fleet.submit(complete(model)))
        until_done(fleet, run_ids)
        assert_sound(fleet)
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
