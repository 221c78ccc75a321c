"""The rules of others in the scheduling benchmark, the disk that loads share, and the figures of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.kernel.priority import Priority
from app.scheduler.planner.cluster import Cluster
from app.scheduler.planner.plan import StartPool, StopPool
from benchmarks import fleet_workloads
from benchmarks.fleet_baselines import LruParallel, Ollama
from benchmarks.fleet_foresight import KnownArrivals
from benchmarks.fleet_simulator import Simulation
from benchmarks.fleet_values import Disk, Outcome, Request, Workload
from benchmarks.fleet_workloads import START_UP
from benchmarks.scheduling import figures
from tests.scheduler.clusters import NOW, gpu, model, pool, seconds, waits


def test_lru_in_parallel_evicts_idle_pools_for_several_models_at_once_and_never_busy_ones() -> None:
    pools = (
        pool("old", "a", {"g0": 12}, last_used=NOW - seconds(90)),
        pool("new", "b", {"g1": 12}, last_used=NOW - seconds(10)),
        pool("busy", "c", {"g2": 12}, busy=1, last_used=NOW - seconds(99)),
    )
    names = ("a", "b", "c", "person", "file", "third")
    cluster = Cluster(tuple(map(gpu, ("g0", "g1", "g2"))), pools, tuple(model(name, 12) for name in names))
    demand = [
        waits("file", age=50, priority=Priority.BATCH),
        waits("person", age=1, priority=Priority.INTERACTIVE),
        waits("third", age=60, priority=Priority.BATCH),
    ]
    actions = LruParallel().plan(cluster, demand, NOW).actions

    assert [one.pool for one in actions if isinstance(one, StopPool)] == ["old", "new"]
    starts = [(one.configuration, one.after) for one in actions if isinstance(one, StartPool)]
    assert starts == [("person", frozenset({"old"})), ("third", frozenset({"new"}))]


def test_known_arrivals_evict_who_is_requested_last_and_load_ahead_what_is_requested_before() -> None:
    """Of two idle pools the one that was used last is requested later; the third model is requested in between."""
    models = tuple(fleet_workloads.model(name, 20) for name in "abc")
    times = (("a", 2.0), ("b", 1.0), ("c", 60.0), ("a", 90.0), ("b", 120.0))
    requests = tuple(Request(name, Priority.STANDARD, "", time, 100, 10) for name, time in times)
    workload = Workload(fleet_workloads.gpus((22.0, 22.0)), models, requests, 150.0)
    waits = {}
    for ahead in (0.0, 1.5):
        done = Simulation(workload, KnownArrivals(workload, ahead), tick=1.0).run().requests
        waits[ahead] = [round(one.started - one.ready, 1) for one in sorted(done, key=lambda one: one.ready)][2:]

    load = round(models[0].layouts[0].load.total_seconds(), 1)
    assert waits[0.0] == [load + 1, 0, load + 1], "b went for c, and c for b"
    assert waits[1.5] == [0, 0, 0]


def test_ollamas_rule_picks_victims_in_an_order_that_differs_by_seed() -> None:
    pools = tuple(pool(f"p{n}", f"m{n}", {"g0": 2}) for n in range(9))
    cluster = Cluster((gpu("g0"),), pools, (*(model(f"m{n}", 2) for n in range(9)), model("wanted", 10)))
    victims = {Ollama(seed=seed).plan(cluster, [waits("wanted")], NOW).actions[0].pool for seed in range(20)}  # type: ignore[union-attr]  # a stop

    assert len(victims) > 3


def test_two_loads_of_one_disk_take_twice_as_long() -> None:
    disk = Disk({"a": 4.0, "b": 6.0})

    assert disk.next_end == 8
    assert disk.advance(8) == ["a"]
    assert disk.next_end == pytest.approx(2)
    assert disk.advance(10) == ["b"]


@pytest.mark.parametrize(("per_host", "both"), [(2, 2.0), (1, 1.0)])
def test_loads_are_slowed_on_one_host_only(per_host: int, both: float) -> None:
    """Two models of the same size that are requested at the same time, on devices of their own."""
    models = (fleet_workloads.model("a", 20), fleet_workloads.model("b", 20))
    requests = tuple(Request(name, Priority.STANDARD, "", 0.0, 100, 10) for name in "ab")
    workload = Workload(fleet_workloads.gpus((22.0, 22.0), per_host), models, requests, 1.0)
    outcome = Simulation(workload, LruParallel()).run()

    reading = models[0].layouts[0].load.total_seconds() - START_UP
    assert [one.started for one in outcome.requests] == pytest.approx([both * reading + START_UP] * 2)


def test_figures_have_the_part_in_time_at_three_targets_and_the_area_under_the_curve() -> None:
    """Waits of a quarter, one, one and a half and three times the target of 20 s."""
    waited = (5.0, 20.0, 30.0, 60.0)
    one = Request("m", Priority.INTERACTIVE, "", 0.0, 1, 1)
    row = figures(Outcome(requests=[replace(one, started=wait, finished=wait + 1) for wait in waited], end=99.0))

    found = [row[key] for key in ("in_time_half", "in_time", "in_time_double", "in_time_area")]
    assert found == pytest.approx([25, 50, 75, 100 * (0.875 + 0.5 + 0.25 + 0) / 4])
