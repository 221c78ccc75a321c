"""
Scheduling: the production planner and ledger on simulated fleets, compared with the rules of others, in the same run.

Arrivals and token counts come from the Azure LLM inference traces of 2023 where --traces names a folder that holds
them, else from a seeded generator; which model a request is for is always drawn by seed. The policy was tuned on seeds
1 to 6; reported are others.

    python -m benchmarks.scheduling [--quick] [--traces DIR] [--only SCENARIO,...] [--seeds N,...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from time import process_time
from typing import Any

from rich.console import Console
from rich.table import Table

from app.kernel import clock
from app.kernel.priority import Priority
from app.kernel.sections.work import PoolSettings
from app.scheduler.planner import placement
from app.scheduler.planner.candidate import PlacementCandidate
from app.scheduler.planner.cluster import Cluster, Configuration
from app.scheduler.planner.demand import ModelDemand, WaitingSteps
from app.scheduler.planner.placement import plan
from app.scheduler.planner.plan import Plan
from app.scheduler.planner.policy import PlacementPolicy
from benchmarks import plan_times
from benchmarks.fleet_baselines import Exclusive, Lru, LruParallel, Ollama, Static
from benchmarks.fleet_foresight import KnownArrivals
from benchmarks.fleet_scenarios import SCENARIOS, TOLD
from benchmarks.fleet_simulator import Simulation
from benchmarks.fleet_values import Outcome, Planner, Request, Workload
from benchmarks.fleet_workloads import Arrivals

#: Where results go by default; git ignores it.
RESULTS = Path(__file__).parent / "results"
#: Seeds of a full and of a quick run, and seconds of arrivals in each.
FULL, QUICK = ((11, 12, 13, 14, 15), 1800.0), ((11,), 600.0)
#: A request that waited for no longer than that counts as served in time.
TARGET = PlacementPolicy().target
#: What never happens to Arriero: bytes that are not there, and grants that are planned and refused.
PROMISES = ("overcommitments", "refused_grants")
OWN, PEER, BOUND = "Arriero", "Ollama's rule", "all resident (bound)"
#: Rules that know what is requested next: no rule of a platform.
SEER, PROPHET = "known arrivals", "known arrivals, loaded ahead"
#: What the others are compared with, and is not one of them.
REFERENCES = frozenset({BOUND, SEER, PROPHET})

Figures = dict[str, float]


@dataclass
class Arriero:
    """The production planner."""

    policy: PlacementPolicy
    name: str = OWN
    by_class: bool = True
    drain: float = PoolSettings().drain_timeout.total_seconds()

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], now: datetime) -> Plan:
        return plan(fleet, demand, now, self.policy)


class ReclaimsAlways(placement.Planner):
    """The planner, except that the owner of a reserve always takes back what it lent."""

    def elsewhere(self, demand: ModelDemand, reclaiming: PlacementCandidate) -> PlacementCandidate:  # noqa: ARG002 it overrides
        return reclaiming


class WithoutElsewhere(Arriero):
    """The production planner without one of its rules, which no number of the policy turns off."""

    def plan(self, fleet: Cluster, demand: Sequence[WaitingSteps], now: datetime) -> Plan:
        return ReclaimsAlways(fleet, demand, now, self.policy).plan()


@dataclass(frozen=True)
class Contender:
    """A planner, made anew for each run from its seed, and what is changed of the workload for it."""

    make: Callable[[int], Planner]
    resident: bool = False
    change: Callable[[Workload], Workload] = lambda workload: workload
    #: Makes the planner from what only the benchmark knows; plans are made each second then.
    informed: Callable[[Workload], Planner] | None = None

    def simulation(self, workload: Workload, seed: int) -> Simulation:
        """A run that has not begun."""
        changed = self.change(workload)
        if self.informed is not None:
            return Simulation(changed, self.informed(changed), tick=1.0)
        return Simulation(changed, self.make(seed), resident=self.resident)


def own(**more: Any) -> Contender:
    return Contender(lambda _: Arriero(PlacementPolicy(**more)))


def informed(ahead: float) -> Contender:
    return Contender(lambda _: Lru(), informed=lambda workload: KnownArrivals(workload, ahead))


def whole_devices(workload: Workload) -> Workload:
    """Every pool takes devices whole: nothing is shared."""
    size = workload.devices[0].capacity_bytes

    def whole(configuration: Configuration) -> Configuration:
        layouts = tuple(replace(one, parts=(size,) * len(one.parts)) for one in configuration.layouts)
        return replace(configuration, layouts=layouts)

    return replace(workload, configurations=tuple(whole(one) for one in workload.configurations))


CONTENDERS: Mapping[str, Contender] = {
    OWN: own(),
    PEER: Contender(lambda seed: Ollama(seed=seed)),
    "LRU, serial drain": Contender(lambda _: Lru()),
    "LRU, parallel": Contender(lambda _: LruParallel()),
    "FIFO": Contender(lambda _: Lru(drains=False)),
    "llama-swap, exclusive": Contender(lambda _: Exclusive()),
    "static partition": Contender(lambda _: Static()),
    SEER: informed(0.0),
    PROPHET: informed(1.5),
    BOUND: Contender(lambda _: Arriero(PlacementPolicy()), resident=True),
}
ABLATIONS: Mapping[str, Contender] = {
    "devices not shared": Contender(lambda _: Arriero(PlacementPolicy()), change=whole_devices),
    "reserves not lent": own(lend=False),
    "reserves always taken back": Contender(lambda _: WithoutElsewhere(PlacementPolicy())),
    "no wait before a drain": own(drain_wait_factor=0.0),
    "no look-ahead": own(look_ahead=0.0),
    "no defragmentation": own(migrate=False),
    "no replicas": own(replica_factor=math.inf),
    "pools with work left alone": own(max_preemptions=0),
    "no batching of switches": own(threshold=0.0, drain_factor=0.01, amortise=0.0),
}
ABLATED = ("zipf", "pipelines", "fragmented", "reserve", "flood", "overload", "swamped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print the tables, write the JSON. 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and ten minutes of arrivals: under a minute")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="a folder with AzureLLMInferenceTrace_*.csv")
    parser.add_argument("--only", default=",".join(SCENARIOS), metavar="SCENARIO,...", help="default: all")
    parser.add_argument("--seeds", metavar="N,...", help="others than those of the reported table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go (benchmarks/results/…)")
    options = parser.parse_args(arguments)
    seeds, length = QUICK if options.quick else FULL
    if options.seeds:
        seeds = tuple(int(seed) for seed in options.seeds.split(","))
    arrivals, names = Arrivals(options.traces, length), options.only.split(",")
    began, used = clock.now(), process_time()
    console = Console(width=max(Console().width, 180))
    console.print(
        f"arrivals: {arrivals.told}; models drawn by Zipf's law, by seed; seeds {list(seeds)}, {length:.0f} s each"
    )

    results: dict[str, dict[str, list[Figures]]] = {}
    for name in names:
        results[name] = compare(CONTENDERS, name, arrivals, seeds)
        console.print(table(name, TOLD[name], results[name]))
    ablations = {name: ablate(name, arrivals, seeds, results[name][OWN]) for name in ABLATED if name in names}
    for name, rows in ablations.items():
        console.print(table(f"{name}: what each part brings", "", rows))
    console.print(verdict(results))
    times = {shape.name: plan_times.measure(shape, 20 if options.quick else 100) for shape in plan_times.shapes()}
    console.print(plan_times.table(times))

    file = options.json or RESULTS / f"scheduling-{began:%Y%m%dT%H%M%S}.json"
    document = {
        "benchmark": "scheduling",
        "began": began.isoformat(),
        "cpu_seconds": process_time() - used,
        "arrivals": arrivals.told,
        "seeds": seeds,
        "length_seconds": length,
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "policy": asdict(PlacementPolicy()),
        "scenarios": results,
        "ablations": ablations,
        "plan_milliseconds": {name: one.milliseconds for name, one in times.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"{process_time() - used:.0f} s of processor time; written to {file}")
    broken = [name for name, rows in results.items() if any(row[key] for row in rows[OWN] for key in PROMISES)]
    if broken:
        console.print(f"{OWN} broke a promise in: {', '.join(broken)}", style="bold red")
    return 1 if broken else 0


def compare(
    contenders: Mapping[str, Contender], scenario: str, arrivals: Arrivals, seeds: Iterable[int]
) -> dict[str, list[Figures]]:
    """Each contender on the same arrivals, for each seed."""
    found: dict[str, list[Figures]] = defaultdict(list)
    for seed in seeds:
        for name, contender in contenders.items():
            outcome = contender.simulation(SCENARIOS[scenario](arrivals, seed), seed).run()
            found[name].append(figures(outcome))
    return dict(found)


def ablate(scenario: str, arrivals: Arrivals, seeds: Sequence[int], shipped: list[Figures]) -> dict[str, list[Figures]]:
    """What a run is without each part, for the first seeds."""
    some = seeds[:3]
    return {"as shipped": shipped[: len(some)], **compare(ABLATIONS, scenario, arrivals, some)}


def figures(outcome: Outcome) -> Figures:
    """What came of a run, in percent, seconds and counts. Who was never served has waited until the end."""
    waits: dict[Priority, list[float]] = {priority: [] for priority in Priority}
    in_time: dict[str, list[bool]] = defaultdict(list)
    #: Waits as multiples of the targets.
    multiples: dict[Priority, list[float]] = {priority: [] for priority in Priority}
    shares: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for request in outcome.requests:
        wait, service = _fate(request, outcome.end)
        waits[request.priority].append(wait)
        in_time[request.namespace].append(math.isfinite(request.finished) and wait <= TARGET[request.priority])
        multiple = wait / TARGET[request.priority] if math.isfinite(request.finished) else math.inf
        multiples[request.priority].append(multiple)
        share = shares[request.namespace, request.configuration]
        share[0] += service
        share[1] += service + wait
    together = [multiple for some in multiples.values() for multiple in some]
    every = [wait for some in waits.values() for wait in some]
    met = [one for some in in_time.values() for one in some]
    capacity = max(outcome.capacity, 1.0)
    return {
        "requests": len(every),
        "in_time": 100 * statistics.fmean(met),
        "in_time_half": 100 * statistics.fmean(multiple <= 0.5 for multiple in together),
        "in_time_double": 100 * statistics.fmean(multiple <= 2 for multiple in together),
        # The mean, over all multiples of the targets from 0 to 2, of the part that is in time.
        "in_time_area": _area(together),
        # The same, where each class counts the same, however many requests it has.
        "in_time_class_area": statistics.fmean(_area(some) for some in multiples.values() if some),
        "in_time_worst_tenant": 100 * min(statistics.fmean(some) for some in in_time.values()),
        "wait_p50": quantile(every, 0.5),
        "wait_p99": quantile(every, 0.99),
        **{f"{priority}_p99": quantile(waits[priority], 0.99) for priority in Priority},
        "jain": jain([service / spent if spent else 1.0 for service, spent in shares.values()]),
        "loads": outcome.loads,
        "reloads": outcome.reloads,
        "moves": outcome.moves,
        "preempted": outcome.preempted,
        "useful": 100 * outcome.useful / capacity,
        "charged": 100 * outcome.charged / capacity,
        "overcommitments": outcome.overcommitments,
        "refused_grants": outcome.refused_grants,
        "failed_loads": outcome.failed_loads,
        "plan_ms": 1000 * outcome.plan_seconds / max(outcome.plans, 1),
    }


def _area(multiples: Sequence[float]) -> float:
    return 100 * statistics.fmean(max(1 - multiple / 2, 0.0) for multiple in multiples)


def _fate(request: Request, end: float) -> tuple[float, float]:
    """Seconds that it waited, and that it was served."""
    if math.isfinite(request.finished):
        return request.started - request.ready, request.finished - request.started
    return end - request.ready, 0.0


def jain(values: Sequence[float]) -> float:
    """1 when all get the same part of their time as service, 1/n when one gets all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def quantile(values: Sequence[float], part: float) -> float:
    """Nan of nothing."""
    return sorted(values)[min(int(part * len(values)), len(values) - 1)] if values else math.nan


def mean(rows: Sequence[Figures], key: str) -> float:
    some = [row[key] for row in rows if math.isfinite(row[key])]
    return statistics.fmean(some) if some else math.nan


def table(title: str, told: str, results: Mapping[str, Sequence[Figures]]) -> Table:
    made = Table(title=f"{title}: {told}" if told else title, title_justify="left")
    columns = (
        "in time %",
        "at x0.5",
        "at x2",
        "area",
        "by class",
        "worst tenant",
        "wait p50",
        "p99",
        "interactive p99",
        "batch p99",
        "Jain",
        "loads",
    )
    for column in ("", *columns, "reloads", "useful %", "charged %", "over-committed", "plan ms"):
        made.add_column(column, justify="right" if column else "left")
    for name, rows in results.items():
        spread = [row["in_time"] for row in rows]
        span = f" [{min(spread):.0f}..{max(spread):.0f}]" if len(rows) > 1 else ""
        made.add_row(
            name,
            f"{mean(rows, 'in_time'):.1f}{span}",
            *(
                f"{mean(rows, f'in_time_{key}'):.1f}"
                for key in ("half", "double", "area", "class_area", "worst_tenant")
            ),
            *(_seconds(mean(rows, key)) for key in ("wait_p50", "wait_p99", "interactive_p99", "batch_p99")),
            f"{mean(rows, 'jain'):.3f}",
            *(f"{mean(rows, key):.0f}" for key in ("loads", "reloads", "useful", "charged")),
            f"{sum(row['overcommitments'] for row in rows):.0f}",
            f"{mean(rows, 'plan_ms'):.2f}",
        )
    return made


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def verdict(results: Mapping[str, Mapping[str, Sequence[Figures]]]) -> Table:
    """Arriero and the best of the others, in each scenario."""
    made = Table(title="Arriero and the best of the others", title_justify="left")
    columns = ("in time %", "best other", "at x0.5", "best other", "at x2", "best other", "area", "best other")
    further = ("area by class", "best other", SEER, PROPHET)
    for column in ("", *columns, *further, "of the bound", "interactive p99", "best other", f"loads / {PEER}"):
        made.add_column(column, justify="right" if column else "left")
    for scenario, rows in results.items():
        ours = rows[OWN]
        others = {name: some for name, some in rows.items() if name != OWN and name not in REFERENCES}
        beside = []
        for key in ("in_time", "in_time_half", "in_time_double", "in_time_area", "in_time_class_area"):
            best = max(others, key=lambda name: mean(others[name], key))
            beside += [f"{mean(ours, key):.1f}", f"{mean(others[best], key):.1f} {best}"]
        beside += [f"{mean(rows[name], 'in_time'):.1f}" for name in (SEER, PROPHET)]
        quickest = min(others, key=lambda name: _or_infinite(mean(others[name], "interactive_p99")))
        made.add_row(
            scenario,
            *beside,
            f"{100 * mean(ours, 'in_time') / mean(rows[BOUND], 'in_time'):.0f} %",
            _seconds(mean(ours, "interactive_p99")),
            f"{_seconds(mean(others[quickest], 'interactive_p99'))} {quickest}",
            f"{mean(ours, 'loads') / mean(rows[PEER], 'loads'):.2f}",
        )
    return made


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


if __name__ == "__main__":
    raise SystemExit(main())
