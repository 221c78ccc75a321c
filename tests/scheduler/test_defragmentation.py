"""Moves that make room before steps wait."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings

from app.fleet.host import HostState
from app.fleet.pool import PoolState
from app.kernel.priority import Priority
from app.scheduler.planner.cluster import Account, Cluster, charges
from app.scheduler.planner.defragmentation import Defragmentation, Disturbance, defragment
from app.scheduler.planner.placement import plan
from app.scheduler.planner.plan import Plan, StartPool
from tests.scheduler.clusters import GB, NOW, Case, applied, cases, gpu, model, pool, ram, waits

TWO = (gpu("g0"), gpu("g1"))


def scattered(**more: object) -> Cluster:
    """Two devices with 8 of 20 GB used each, and a model that needs 18 on one."""
    pools = tuple(pool(f"p{n}", f"s{n}", {f"g{n}": 8}, **more) for n in range(2))
    return Cluster(TWO, pools, (model("s0", 8, load=3), model("s1", 8, load=9), model("large", 18)))


def test_the_cheapest_move_makes_room() -> None:
    made = defragment(scattered(), [], NOW)

    (move,), (gain,) = made.moves, made.gains
    assert (move.pool, move.bytes) == ("p0", {"g1": 8 * GB})
    assert gain.bytes == {"g0": 18 * GB}
    assert gain.reason == (
        "`large` needs 16.76 GiB and fits nowhere, though 22.35 GiB are free in total; "
        "after 1 move, which loads for 3 s, it fits"
    )


def test_no_pool_is_moved_that_works_or_has_demand_or_is_pinned() -> None:
    busy = scattered(busy=1, serving=Priority.BATCH)
    assert defragment(busy, [], NOW).moves == ()
    assert "no moves of idle pools help" in defragment(busy, [], NOW).stuck[0].reason
    assert defragment(scattered(), [waits("s0"), waits("s1")], NOW).moves == ()
    pinned = replace(
        scattered(), configurations=(model("s0", 8, pinned=True), model("s1", 8, pinned=True), model("large", 18))
    )
    assert defragment(pinned, [], NOW).moves == ()


def test_moves_beyond_the_budget_are_left_out_with_a_reason() -> None:
    made = defragment(scattered(), [], NOW, Disturbance(moves=4, seconds=2))

    assert made.moves == ()
    assert made.stuck[0].reason.endswith("it would take 1 move, which loads for 3 s: more than the budget allows")


def test_no_pool_is_moved_for_a_model_that_fits_or_never_can() -> None:
    fits = replace(scattered(), configurations=(model("s0", 8), model("s1", 8), model("small", 9)))
    never = replace(scattered(), configurations=(model("s0", 8), model("s1", 8), model("huge", 50)))
    too_large = replace(scattered(), configurations=(model("s0", 8), model("s1", 8), model("large", 21)))

    assert defragment(fits, [], NOW) == defragment(never, [], NOW) == defragment(too_large, [], NOW)
    assert defragment(fits, [], NOW) == Defragmentation()


def test_a_move_within_a_host_frees_no_ram() -> None:
    pools = (pool("p", "a", {"g0": 9, "ram-box": 1}), pool("q", "b", {"g0": 4, "ram-box": 3}))
    models = (model("a", 9, ram=1), model("b", 4, ram=3, pinned=True), model("c", 2, ram=3))

    assert defragment(Cluster((*TWO, ram(6)), pools, models), [], NOW).moves == ()
    assert defragment(Cluster((*TWO, ram(6)), pools[:1], models), [], NOW) == Defragmentation()


def test_moves_stay_within_the_quota_of_a_namespace() -> None:
    """While it moves, a pool holds its bytes twice; the ledger would refuse the second claim otherwise."""
    pools = tuple(pool(f"p{n}", f"s{n}", {f"g{n}": 11}, namespace="x") for n in range(2))
    models = tuple(model(f"s{n}", 11) for n in range(2)) + tuple(model(f"large-{n}", 18) for n in range(2))
    cluster = Cluster((*TWO, gpu("g2", 11), gpu("g3", 11)), pools, models)

    for limit, moves in ((22, 0), (33, 1), (44, 2)):
        limited = replace(cluster, accounts={"x": Account(max_bytes=limit * GB)})
        assert len(defragment(limited, [], NOW).moves) == moves


@settings(max_examples=60, deadline=None)
@given(cases())
def test_moves_use_free_bytes_and_gain_what_they_say(case: Case) -> None:
    made = defragment(case.cluster, case.waiting, NOW)
    of = {one.id: one for one in case.cluster.pools}
    moved = applied(case.cluster, Plan(made.moves))

    charged = charges(moved)
    assert [d.id for d in moved.devices if charged[d.id] > d.capacity_bytes] == []
    assert all(of[move.pool].state is PoolState.SERVING and not of[move.pool].busy for move in made.moves)
    after = replace(moved, pools=tuple(p for p in moved.pools if p.id not in {move.pool for move in made.moves}))
    for gain in made.gains:
        free = charges(after)
        assert all(
            free[d.id] + gain.bytes.get(d.id, 0) <= d.capacity_bytes - d.unmanaged_bytes
            for d in after.devices
            if d.id in gain.bytes
        )
        standing = any(one.min_pools for one in after.configurations)
        if standing or any(device.state is HostState.DRAINING for device in after.devices):
            continue  # others may come first
        following = plan(after, [waits(gain.configuration)], NOW)
        assert gain.configuration in {one.configuration for one in following.actions if isinstance(one, StartPool)}
