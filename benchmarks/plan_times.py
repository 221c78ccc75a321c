"""
Plan times: processor time of one plan, for fleets of several shapes and up to 1,000 devices, 200 models and 10,000 steps.

Each waiting step is a group of its own, which is the worst case: the platform counts steps by model, class and namespace.
Plans of all shapes are timed in turn, so that a slow moment of the machine is not one shape's.

    python -m benchmarks.plan_times [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
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
from app.scheduler.planner.plan import Plan
from benchmarks.fleet_workloads import large_fleet

#: The aim: milliseconds of processor time of one plan on one core.
AIM = 50.0
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

    devices: int
    pools: int
    steps: int
    actions: int
    refusals: int
    milliseconds: list[float]


def fleet(devices: int, steps: int, resident: float) -> Fleet:
    """See `large_fleet`: of the pools 60 % are idle."""
    return large_fleet(devices, MODELS, steps, resident)


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
    by_type: dict[str, list[Device]] = {}
    for device in cluster.devices:
        by_type.setdefault(device.type, []).append(device)
    for number, configuration in enumerate(cluster.configurations):
        single = [layout for layout in configuration.layouts if len(layout.parts) == 1]
        if number % 10 == 0 and single:
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


def shapes() -> list[Shape]:
    """Those of the documentation, then the others."""
    few, many, steps = 64, 1_000, 10_000
    found = []
    for devices, count in ((few, 1_000), (many, steps)):
        for told, resident in (("every model has pools", 1.0), ("half have none", 0.5), ("nine in ten have none", 0.1)):
            for kind, change in (("mixed", lambda made: made), ("all busy", all_busy)):
                found.append(
                    Shape(
                        f"{devices:,} devices, {count:,} steps, {kind}, {told}",
                        lambda devices=devices, count=count, resident=resident, change=change: change(  # type: ignore[misc]
                            fleet(devices, count, resident)
                        ),
                    )
                )
    others: Sequence[tuple[str, float, Callable[[Fleet], Fleet]]] = (
        ("all idle", 0.5, all_idle),
        ("filled, all idle", 0.5, lambda made: all_idle(filled(made))),
        ("filled, all busy", 0.5, lambda made: all_busy(filled(made))),
        ("filled, all busy, few resident", 0.1, lambda made: all_busy(filled(made))),
        ("all busy and fresh", 0.1, fresh),
        ("filled, all busy and fresh", 0.1, lambda made: fresh(filled(made))),
        ("filled, all busy and fresh, overdue", 0.1, lambda made: overdue(fresh(filled(made)))),
        ("filled, one type, all busy and fresh", 0.1, lambda made: fresh(filled(of_one_type(made)))),
        ("nothing waits", 1.0, without_steps),
        ("no pools", 1.0, without_pools),
        ("overdue", 0.5, overdue),
        ("all busy and overdue", 0.1, lambda made: overdue(all_busy(made))),
        ("loading", 0.5, loading),
        ("limits, reserves, targets, anti-affinity", 0.5, governed),
        ("one type of device", 0.5, of_one_type),
        ("one model", 0.5, of_one_model),
        ("every model split", 0.5, split),
    )
    for devices in (few, many):
        for told, resident, change in others:
            found.append(
                Shape(
                    f"{devices:,} devices, {steps:,} steps, {told}",
                    lambda devices=devices, resident=resident, change=change: change(fleet(devices, steps, resident)),  # type: ignore[misc]
                )
            )
    return found
