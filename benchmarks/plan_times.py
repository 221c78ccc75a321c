"""
Plan times: processor time of one plan of 200 models, for fleets of several shapes and up to 1,000 devices.

Each waiting step is a group of its own, which is the worst case: the platform counts steps by model, class and
namespace. The shapes are mixed and busy fleets with many and few models that have pools; and fleets that are idle,
empty, filled with small pools, split, overdue, loading, or governed by limits, reserves and targets.

    python -m benchmarks.plan_times [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from time import process_time

from rich.console import Console
from rich.table import Table

from app.fleet.ledger.reservation import ReservedCapacity
from app.fleet.pool import PoolState
from app.kernel.priority import Priority
from app.scheduler.planner.cluster import Account, Cluster, Configuration, Device, Packing, Pool, Reserve, charges
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.placement import plan
from benchmarks.fleet_workloads import large_fleet

#: Models of each fleet.
MODELS = 200

Fleet = tuple[Cluster, list[WaitingSteps], datetime]


@dataclass(frozen=True, slots=True)
class Shape:
    """A fleet that plans are timed for."""

    name: str
    make: Callable[[], Fleet]


@dataclass(frozen=True, slots=True)
class PlanTimes:
    """Processor milliseconds of the plans for one fleet."""

    pools: int
    actions: int
    refusals: int
    milliseconds: list[float]


def all_busy(made: Fleet) -> Fleet:
    """Every pool works, at steps of any class."""
    cluster, waiting, now = made
    chance = Random(2)
    pools = tuple(
        replace(
            one,
            busy=chance.randint(1, 4),
            serving=chance.choice(tuple(Priority)),
            work_left=timedelta(seconds=chance.uniform(1, 30)),
        )
        for one in cluster.pools
    )
    return replace(cluster, pools=pools), waiting, now


def all_idle(made: Fleet) -> Fleet:
    """No pool works."""
    cluster, waiting, now = made
    pools = tuple(replace(one, busy=0, serving=None, work_left=timedelta(0)) for one in cluster.pools)
    return replace(cluster, pools=pools), waiting, now


def without_steps(made: Fleet) -> Fleet:
    """Nothing waits."""
    cluster, _, now = made
    return cluster, [], now


def without_pools(made: Fleet) -> Fleet:
    """Nothing is loaded."""
    cluster, waiting, now = made
    return replace(cluster, pools=()), waiting, now


def overdue(made: Fleet) -> Fleet:
    """Steps have waited for minutes."""
    cluster, waiting, now = made
    return cluster, [replace(one, oldest=one.oldest - timedelta(minutes=5)) for one in waiting], now


def loading(made: Fleet) -> Fleet:
    """Half of the pools load or have only just loaded: they are fresh."""
    cluster, waiting, now = made
    chance = Random(3)
    pools = []
    for one in cluster.pools:
        match chance.randrange(4):
            case 0:
                later = now + timedelta(seconds=chance.uniform(1, 20))
                state = PoolState.STARTING
                one = replace(one, state=state, loaded=None, busy=0, serving=None, expected=later, last_used=None)
            case 1:
                one = replace(one, loaded=now - timedelta(seconds=3), last_used=now)
        pools.append(one)
    return replace(cluster, pools=tuple(pools)), waiting, now


def filled(made: Fleet) -> Fleet:
    """Further pools of small models take what is free: eight on a device, and more."""
    cluster, waiting, now = made
    chance = Random(5)
    pools = list(cluster.pools)
    free = charges(cluster)
    used = {one.configuration for one in pools}
    by_type: dict[str, list[tuple[Configuration, int]]] = {}
    for one in cluster.configurations:
        for layout in one.layouts:
            if layout.total_bytes < 5 * 10**9 and one.id in used:
                by_type.setdefault(layout.type, []).append((one, layout.total_bytes))
    for device in cluster.devices:
        left = device.capacity_bytes - free[device.id]
        some = by_type.get(device.type, [])
        while fitting := [pair for pair in some if pair[1] <= left]:
            configuration, size = chance.choice(fitting)
            left -= size
            began = now - timedelta(seconds=chance.uniform(50, 4000))
            used_at = now - timedelta(seconds=chance.uniform(0, 200))
            id_ = f"pool-{len(pools)}"
            pools.append(
                Pool(
                    id_,
                    configuration.id,
                    PoolState.SERVING,
                    {device.id: size},
                    4,
                    began,
                    loaded=began,
                    last_used=used_at,
                )
            )
    return replace(cluster, pools=tuple(pools)), waiting, now


def fresh(made: Fleet) -> Fleet:
    """Every pool works and has only just loaded: nothing can be evicted."""
    cluster, waiting, now = all_busy(made)
    pools = tuple(replace(one, loaded=now - timedelta(seconds=1)) for one in cluster.pools)
    return replace(cluster, pools=pools), waiting, now


def governed(made: Fleet) -> Fleet:
    """Namespaces have limits of bytes; models have reserves, targets, anti-affinities, or are spread."""
    cluster, waiting, now = made
    chance = Random(4)
    held: dict[str, int] = {}
    pools = []
    for pool in cluster.pools:
        namespace = f"tenant-{chance.randrange(20)}"
        held[namespace] = held.get(namespace, 0) + sum(pool.bytes.values())
        pools.append(replace(pool, namespace=namespace))
    accounts = {
        name: Account(1.0, account.attained_seconds, int(held.get(name, 0) * chance.choice((0.9, 1.1))) or None)
        for name, account in cluster.accounts.items()
    }
    configurations, reserves = [], []
    by_type: dict[str, list[Device]] = defaultdict(list)
    for device in cluster.devices:
        by_type[device.type].append(device)
    for number, configuration in enumerate(cluster.configurations):
        single = [layout for layout in configuration.layouts if len(layout.parts) == 1]
        if number % 10 == 0 and single and len(by_type[single[0].type]) > number // 10:
            configuration = replace(configuration, reserve=Reserve(1))
            device = by_type[single[0].type][number // 10]
            parts = single[0].on([device.id])
            reserves.append(ReservedCapacity(f"reserve-{number}", configuration.id, parts))
        elif number % 10 == 1:
            configuration = replace(configuration, min_pools=2)
        elif number % 10 == 2:
            configuration = replace(configuration, packing=Packing.SPREAD)
        elif number % 10 == 3:
            configuration = replace(configuration, anti_affinity=frozenset({f"model-{number + 4}"}))
        configurations.append(configuration)
    cluster = replace(
        cluster,
        pools=tuple(pools),
        configurations=tuple(configurations),
        reserves=tuple(reserves),
        accounts=accounts,
    )
    return cluster, waiting, now


def of_one_type(made: Fleet) -> Fleet:
    """All devices are of one type."""
    cluster, waiting, now = made
    devices = tuple(
        replace(one, type="large", capacity_bytes=max(one.capacity_bytes, 76 * 10**9)) for one in cluster.devices
    )
    configurations = tuple(
        replace(one, layouts=tuple(layout for layout in one.layouts if layout.type == "large"))
        for one in cluster.configurations
    )
    return replace(cluster, devices=devices, configurations=configurations), waiting, now


def of_one_model(made: Fleet) -> Fleet:
    """All pools are of one model, and so are nine in ten steps."""
    cluster, waiting, now = made
    small = min(cluster.configurations, key=lambda one: one.layouts[0].total_bytes)
    small = replace(small, max_pools=len(cluster.pools) * 2)
    pools = tuple(replace(one, configuration=small.id) for one in cluster.pools)
    configurations = tuple(small if one.id == small.id else one for one in cluster.configurations)
    waiting = [one if number % 10 == 0 else replace(one, model=small.model) for number, one in enumerate(waiting)]
    return replace(cluster, pools=pools, configurations=configurations), waiting, now


def split(made: Fleet) -> Fleet:
    """Every model is split over two to eight devices; pools are where they were."""
    cluster, waiting, now = made

    def parted(number: int, configuration: Configuration) -> Configuration:
        count = (2, 3, 4, 8)[number % 4]
        layouts = tuple(
            replace(layout, parts=(min(layout.total_bytes // 2, 20 * 10**9),) * count)
            for layout in configuration.layouts
        )
        return replace(configuration, layouts=layouts)

    configurations = tuple(parted(number, one) for number, one in enumerate(cluster.configurations))
    return replace(cluster, configurations=configurations), waiting, now


#: What is done to a fleet, by its name in the table.
KINDS: Mapping[str, tuple[float, Callable[[Fleet], Fleet]]] = {
    "all idle": (0.5, all_idle),
    "nothing waits": (1.0, without_steps),
    "no pools": (1.0, without_pools),
    "overdue": (0.5, overdue),
    "all busy and overdue": (0.1, lambda made: overdue(all_busy(made))),
    "loading": (0.5, loading),
    "all busy and fresh": (0.1, fresh),
    "limits, reserves, targets, anti-affinity": (0.5, governed),
    "one type of device": (0.5, of_one_type),
    "one model": (0.5, of_one_model),
    "every model split": (0.5, split),
    "filled, all idle": (0.5, lambda made: all_idle(filled(made))),
    "filled, all busy": (0.5, lambda made: all_busy(filled(made))),
    "filled, all busy, few resident": (0.1, lambda made: all_busy(filled(made))),
    "filled, all busy and fresh": (0.1, lambda made: fresh(filled(made))),
    "filled, all busy, fresh, overdue": (0.1, lambda made: overdue(fresh(filled(made)))),
    "filled, one type, all busy and fresh": (0.1, lambda made: fresh(filled(of_one_type(made)))),
}


def shapes() -> list[Shape]:
    """Mixed and busy fleets with many and few models that have pools, then the other kinds."""
    found = []
    for devices, steps in ((64, 1_000), (1_000, 10_000)):
        for name, resident in (("every model has pools", 1.0), ("half have none", 0.5), ("nine in ten have none", 0.1)):
            mixed = partial(large_fleet, devices, MODELS, steps, resident)
            found.append(Shape(f"{devices:,} devices, {steps:,} steps, mixed, {name}", mixed))
            busy = partial(_changed, mixed, all_busy)
            found.append(Shape(f"{devices:,} devices, {steps:,} steps, all busy, {name}", busy))
    for devices in (64, 1_000):
        for kind, (resident, change) in KINDS.items():
            made = partial(_changed, partial(large_fleet, devices, MODELS, 10_000, resident), change)
            found.append(Shape(f"{devices:,} devices, 10,000 steps, {kind}", made))
    return found


def _changed(make: Callable[[], Fleet], change: Callable[[Fleet], Fleet]) -> Fleet:
    return change(make())


def measure(shape: Shape, rounds: int) -> PlanTimes:
    """Time the plans of one shape, after one that is not counted."""
    cluster, waiting, now = shape.make()
    made = plan(cluster, waiting, now)
    times = []
    for _ in range(rounds):
        began = process_time()
        plan(cluster, waiting, now)
        times.append(1000 * (process_time() - began))
    return PlanTimes(len(cluster.pools), len(made.actions), len(made.refusals), times)


def table(found: Mapping[str, PlanTimes]) -> Table:
    """A row for each shape."""
    made = Table(title=f"One plan of {MODELS} models, in milliseconds of processor time", title_justify="left")
    for column in ("", "median", "slowest", "pools", "actions", "refusals"):
        made.add_column(column, justify="right" if column else "left")
    for name, one in found.items():
        times = one.milliseconds
        figures = (f"{statistics.median(times):.1f}", f"{max(times):.1f}")
        made.add_row(name, *figures, f"{one.pools:,}", str(one.actions), str(one.refusals))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="plans of each shape (100)")
    parser.add_argument("--only", default="", metavar="TEXT", help="shapes whose name contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time to this file")
    options = parser.parse_args(arguments)
    found = {}
    for shape in shapes():
        if options.only in shape.name:
            found[shape.name] = measure(shape, options.rounds)
    Console(width=140).print(table(found))
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        document = {"machine": machine, "shapes": {name: asdict(one) for name, one in found.items()}}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
