"""
The scaler on a simulated cloud: cost against waiting, beside fixed numbers of hosts and a rule of queue depth.

    python -m benchmarks.scaler --seed 11

Hosts take 90 s to boot and cost by the second; a model takes 20 s to load on a new one. A day of arrivals: a daily
curve with bursts, or bursts alone. The scaler is the real decision of `app/governance/scaler/desired.py`, each 5 s.
Time is simulated; the figures are the same on each machine.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from app.fleet.host import HostState
from app.governance.scaler.desired import ModelLoad, ScaledHost, ScalerLimits, ScalerState, decide
from app.kernel.sections.scaler import ScaledClass

#: Seconds of a day, of a tick, of a boot with its load, and of one step.
_DAY, _TICK, _BOOT, _STEP = 86_400, 5, 110, 20.0
#: Slots of a host, and the price of its hour.
_SLOTS, _HOUR = 8, 0.80
_GIB = 2**30
_CLASS = ScaledClass(name="l4", type="NVIDIA L4", bytes=22 * _GIB, min=0, max=12)
_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class _Host:
    name: str
    ready: float
    #: When each running step ends.
    ends: list[float] = field(default_factory=list)
    draining: bool = False


class Cloud:
    """Hosts, and the steps that wait for a slot."""

    def __init__(self) -> None:
        self.hosts: list[_Host] = []
        self.queue: list[float] = []
        self.cost = 0.0
        self.boots = 0
        self._names = iter(range(10**9))

    def add(self, count: int, now: float) -> None:
        """Boot hosts."""
        self.boots += count
        self.hosts += [_Host(f"h{next(self._names)}", now + _BOOT) for _ in range(count)]

    def give_up(self, names: Sequence[str]) -> None:
        """End hosts. Fails when one works."""
        assert not any(one.ends for one in self.hosts if one.name in names)
        self.hosts = [one for one in self.hosts if one.name not in names]

    def pass_time(self, now: float) -> list[float]:
        """One tick: end steps, begin others, pay; returns the waits of those that began."""
        waits = []
        for host in self.hosts:
            while host.ends and host.ends[0] <= now:
                heapq.heappop(host.ends)
            while self.queue and not host.draining and host.ready <= now and len(host.ends) < _SLOTS:
                waits.append(now - self.queue.pop(0))
                heapq.heappush(host.ends, now + _STEP)
        self.cost += len(self.hosts) * _HOUR * _TICK / 3600
        return waits

    @property
    def busy(self) -> int:
        """Steps that run."""
        return sum(len(one.ends) for one in self.hosts)


#: Changes the hosts of a cloud.
Rule = Callable[[Cloud, float], None]


def arrivals(kind: str, seed: int) -> list[float]:
    """The instants of a day's steps: a daily curve with bursts (`daily`), or bursts alone (`bursts`)."""
    chance, found = random.Random(seed), []
    bursts = sorted(chance.uniform(0, _DAY) for _ in range(10))
    at, highest = 0.0, 6.0
    while (at := at + chance.expovariate(highest)) < _DAY:  # thinned to the rate of the moment
        curve = 0.9 * math.sin(math.pi * at / _DAY) ** 4 if kind == "daily" else 0.0
        rate = curve + sum(1.5 for begin in bursts if begin <= at < begin + 600)
        if chance.random() < min(rate, highest) / highest:
            found.append(at)
    return found


def fixed(count: int) -> Rule:
    """So many hosts, always."""

    def rule(cloud: Cloud, now: float) -> None:
        if not cloud.hosts:
            cloud.add(count, now - _BOOT)

    return rule


def by_depth(per_host: int) -> Rule:
    """A host for so many waiting or running steps, at once up and down, as a plain rule of queue depth."""

    def rule(cloud: Cloud, now: float) -> None:
        wanted = min(_CLASS.max, math.ceil((len(cloud.queue) + cloud.busy) / per_host))
        if wanted > len(cloud.hosts):
            cloud.add(wanted - len(cloud.hosts), now)
        idle = [one.name for one in cloud.hosts if not one.ends and one.ready <= now]
        cloud.give_up(idle[: max(0, len(cloud.hosts) - wanted)])

    return rule


def scaler(down: float, target: float) -> Rule:
    """The scaler, with a cool-down and a target of waiting in seconds."""
    limits = ScalerLimits(timedelta(seconds=target), timedelta(seconds=30), timedelta(seconds=down))
    state = [ScalerState()]

    def rule(cloud: Cloud, now: float) -> None:
        load = ModelLoad(
            "a:1", 10 * _GIB, _SLOTS // 2, len(cloud.queue), len(cloud.queue) * _STEP,
            now - cloud.queue[0] if cloud.queue else 0.0, cloud.busy, any(one.ready <= now for one in cloud.hosts),
        )  # fmt: skip
        hosts = [
            ScaledHost(one.name, HostState.DRAINING if one.draining else HostState.SCHEDULABLE,
                       pools=int(bool(one.ends)), busy=len(one.ends))
            for one in cloud.hosts if one.ready <= now
        ]  # fmt: skip
        found = decide(_CLASS, [load], hosts, state[0], limits, _BEGAN + timedelta(seconds=now))
        state[0] = found.state
        for one in cloud.hosts:
            one.draining = (one.draining or one.name in found.drain) and one.name not in found.keep
        cloud.give_up(found.release)
        surplus = max(0, len(cloud.hosts) - found.hosts)
        cloud.give_up([one.name for one in cloud.hosts if one.ready > now][:surplus])
        cloud.add(max(0, found.hosts - len(cloud.hosts)), now)

    return rule


def simulate(rule: Rule, steps: Sequence[float]) -> dict[str, float]:
    """A day under a rule, until all steps have begun."""
    cloud, waits, begun, now = Cloud(), list[float](), 0, 0.0
    while now < _DAY or begun < len(steps):
        while begun + len(cloud.queue) < len(steps) and steps[begun + len(cloud.queue)] <= now:
            cloud.queue.append(steps[begun + len(cloud.queue)])
        new = cloud.pass_time(now)
        begun += len(new)
        waits += new
        rule(cloud, now)
        now += _TICK
        assert now < 3 * _DAY, "the rule never has enough hosts"
    ordered = sorted(waits)
    return {
        "cost": round(cloud.cost, 2),
        "boots": cloud.boots,
        "mean_wait_s": round(statistics.fmean(waits), 1),
        "p95_wait_s": round(ordered[int(0.95 * len(ordered))], 1),
        "most_wait_s": round(ordered[-1], 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and the same as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaler", description=__doc__)
    parser.add_argument("--seed", type=int, default=11)
    given = parser.parse_args(arguments)
    rules: dict[str, Callable[[], Rule]] = {
        "fixed, 2 hosts": lambda: fixed(2),
        "fixed, 4 hosts": lambda: fixed(4),
        "fixed, 8 hosts": lambda: fixed(8),
        "queue depth, 8 steps a host": lambda: by_depth(8),
        "scaler, 5 min cool-down, 60 s target": lambda: scaler(300, 60),
        "scaler, 15 min cool-down, 60 s target": lambda: scaler(900, 60),
        "scaler, 5 min cool-down, 20 s target": lambda: scaler(300, 20),
    }
    table = {kind: {name: simulate(make(), arrivals(kind, given.seed)) for name, make in rules.items()}
             for kind in ("daily", "bursts")}  # fmt: skip
    for kind, rows in table.items():
        sys.stdout.write(f"{kind}: {len(arrivals(kind, given.seed))} steps\n")
        sys.stdout.writelines(
            f"  {name:<40} {row['cost']:>7.2f} a day  {row['boots']:>4} boots  mean {row['mean_wait_s']:>6.1f} s  "
            f"p95 {row['p95_wait_s']:>6.1f} s  most {row['most_wait_s']:>7.1f} s\n"
            for name, row in rows.items()
        )
    sys.stdout.write(json.dumps(table) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
