"""
Workflows: how fast steps of real graphs follow each other, and how maps grow; beside Celery's canvas in the same run.

A chain of 100 noops, 200 runs of 10 steps side by side, and maps of 100, 1,000 and 10,000 items with a join of all.
For the first two, the gap between the end of a step's work and the beginning of its successor's, as the workers saw it;
for maps, the gap between the last item and the join, and the exponent of the growth: 1 is linear.
The contenders take turns in each round, in an order that rotates; what is reported is the median.
The first round warms up and is thrown away.

`python -m benchmarks.workflows [--quick] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.kernel import clock, log
from app.kernel.sections.servers import LogSettings
from benchmarks import stamps
from benchmarks.contenders import Arriero, Burst, Contender, PlainCelery, Site, Unheard, cpu_of
from benchmarks.stamps import Stamp
from benchmarks.steps import DISTRIBUTIONS, RESULTS, servers

PEER = "celery"
OWN = "arriero"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    #: Threads of the worker process; the default of `control.concurrency`.
    threads: int = 8
    rounds: int = 3
    chain: int = 100
    runs: int = 200
    run_length: int = 10
    maps: tuple[int, ...] = (100, 1_000, 10_000)
    #: Maps up to this size in the round that warms up.
    warm: int = 1_000


FULL = Plan()
QUICK = Plan(rounds=1, chain=50, runs=30, maps=(100, 1_000), warm=100)


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn of one contender."""

    contender: str
    round: int
    #: `chain`, `runs`, or `map of <items>`.
    measurement: str
    steps: int
    #: From before the first submission until the last end was seen.
    seconds: float
    #: Seconds between the end of a step and the beginning of what follows.
    gaps: tuple[float, ...]
    #: Processor seconds of the workers, of Postgres and of Valkey meanwhile.
    cpu_workers: float
    cpu_postgres: float
    cpu_valkey: float
    #: Load average of the last minute when it began.
    load: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """What every contender does in its turn."""

    name: str
    steps: int
    run: Callable[[Contender], Burst]
    gaps: Callable[[Sequence[Stamp]], list[float]]

    def fits(self, contender: Contender) -> bool:
        """Items of maps always go by message, so that one of the two is enough."""
        return not self.name.startswith("map") or "message" not in contender.name


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of less, without the largest map")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go (benchmarks/results/…)")
    asked = parser.parse_args(arguments)
    plan = QUICK if asked.quick else FULL
    began = clock.now()
    file = asked.json or RESULTS / f"workflows-{began:%Y%m%dT%H%M%S}.json"
    console = Console(width=max(Console().width, 132))
    log.configure(LogSettings(level="warning"))

    with servers() as (started, directory), contenders(Site(started, directory, 1, plan.threads)) as able:
        told = {contender.name: contender.told for contender in able}
        samples = measure(able, plan, console)

    summary = summarised(samples)
    for made in tables(summary, plan):
        console.print(made)
    document = {
        "benchmark": "workflows",
        "began": began.isoformat(),
        "seconds": (clock.now() - began).total_seconds(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "load": {"lowest": min(s.load for s in samples), "highest": max(s.load for s in samples)},
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "plan": asdict(plan),
        "contenders": told,
        "summary": summary,
        "growth": {contender: growth(summary, contender, plan) for contender in (OWN, PEER)},
        "samples": [asdict(sample) for sample in samples],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"load average {document['load']}; written to {file}")
    return 0


@contextmanager
def contenders(site: Site) -> Iterator[list[Contender]]:
    """All of them, with their workers up and their stamps written."""
    able: list[Contender] = [
        Arriero(site, OWN, 0, stamped=True),
        Arriero(site, "arriero, by message", 1, by_message=True, stamped=True),
        PlainCelery(site, PEER, 2, settings="same", pool="custom", stamped=True),
    ]
    with ExitStack() as stack:
        for made in able:
            stack.callback(made.stop)
            made.start()
        for made in able:
            made.wait()
        yield able


def measure(able: Sequence[Contender], plan: Plan, console: Console) -> list[Sample]:
    """All rounds. Every contender in turn does each measurement, and the next round begins with the next of them."""
    samples: list[Sample] = []
    for number in range(plan.rounds + 1):
        start = number % len(able)
        order = [*able[start:], *able[:start]]
        for measurement in _measurements(plan, warming=number == 0):
            samples += [_taken(one, number, measurement) for one in order if measurement.fits(one)]
        console.print(f"round {number} of {plan.rounds}, load {os.getloadavg()[0]:.1f}")
    return [sample for sample in samples if sample.round > 0]


def _measurements(plan: Plan, *, warming: bool) -> list[Measurement]:
    def map_of(items: int) -> Measurement:
        return Measurement(f"map of {items}", items, lambda one: one.mapped(items), stamps.join_gaps)

    return [
        Measurement("chain", plan.chain, lambda one: one.chains(1, plan.chain), stamps.chain_gaps),
        Measurement(
            "runs", plan.runs * plan.run_length, lambda one: one.chains(plan.runs, plan.run_length), stamps.chain_gaps
        ),
        *(map_of(items) for items in plan.maps if items <= plan.warm or not warming),
    ]


def _taken(contender: Contender, number: int, measurement: Measurement) -> Sample:
    servers = contender.site.servers
    pids = [server.pid for server in (servers.postgres, servers.valkey) if server is not None]
    assert contender.stamps is not None
    stamps.taken(contender.stamps)
    load = os.getloadavg()[0]
    before = [contender.cpu(), *(cpu_of(pid) for pid in pids if pid is not None)]
    try:
        burst = measurement.run(contender)
    except Unheard as error:
        # No cost of what is measured: it is said, and the turn is taken again.
        print(f"{measurement.name} taken again: {error}")
        return _taken(contender, number, measurement)
    after = [contender.cpu(), *(cpu_of(pid) for pid in pids if pid is not None)]
    used = [round(late - early, 3) for early, late in zip(before, after, strict=True)]
    gaps = tuple(round(gap, 6) for gap in measurement.gaps(stamps.taken(contender.stamps)))
    return Sample(contender.name, number, measurement.name, measurement.steps, burst.total, gaps, *used, load)


Summary = Mapping[str, Mapping[str, Mapping[str, float]]]


def summarised(samples: Sequence[Sample]) -> Summary:
    """Medians over the rounds, and percentiles over all gaps of all rounds: measurement -> contender -> figure."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.measurement, sample.contender), []).append(sample)
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for (measurement, contender), group in groups.items():
        gaps = sorted(1000 * gap for sample in group for gap in sample.gaps)
        figures = {
            "seconds": statistics.median(s.seconds for s in group),
            "steps_per_s": statistics.median(s.steps / s.seconds for s in group),
            "gap_p50_ms": statistics.median(gaps),
            "gap_p99_ms": gaps[min(len(gaps) - 1, round(len(gaps) * 0.99))],
        }
        for part in ("workers", "postgres", "valkey"):
            figures[f"{part}_cpu_ms"] = statistics.median(getattr(s, f"cpu_{part}") * 1000 / s.steps for s in group)
        summary.setdefault(measurement, {})[contender] = figures
    return summary


def growth(summary: Summary, contender: str, plan: Plan) -> dict[str, float]:
    """The exponents with which time and processor time of a map grow with its items: a least-squares fit of logs."""
    figures = [summary[f"map of {items}"][contender] for items in plan.maps]
    cpu = [
        items * sum(one[f"{part}_cpu_ms"] for part in ("workers", "postgres", "valkey"))
        for items, one in zip(plan.maps, figures, strict=True)
    ]
    return {"seconds": _exponent(plan.maps, [one["seconds"] for one in figures]), "cpu": _exponent(plan.maps, cpu)}


def _exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def tables(summary: Summary, plan: Plan) -> Iterator[Table]:
    """Medians, and in brackets the ratio to Celery under the same settings."""
    names = {"chain": f"a chain of {plan.chain}", "runs": f"{plan.runs} runs of {plan.run_length}"}
    title = f"Noop steps: one worker process of {plan.threads} threads, medians of {plan.rounds} round(s)"
    made = Table(title=title, caption=f"(…): times the figure of {PEER}; CPU of worker/Postgres/Valkey")
    for column in ("", "contender"):
        made.add_column(column, no_wrap=True)
    for column in ("steps/s", "CPU\nms/step", "gap\np50 ms", "gap\np99 ms"):
        made.add_column(column, justify="right")
    for measurement, by_contender in summary.items():
        peer = by_contender[PEER]
        for contender, figures in by_contender.items():
            cpu = "/".join(f"{figures[f'{part}_cpu_ms']:.2f}" for part in ("workers", "postgres", "valkey"))
            made.add_row(
                names.get(measurement, measurement),
                contender,
                f"{figures['steps_per_s']:.0f} ({figures['steps_per_s'] / peer['steps_per_s']:.2f})",
                cpu,
                f"{figures['gap_p50_ms']:.1f} ({figures['gap_p50_ms'] / peer['gap_p50_ms']:.2f})",
                f"{figures['gap_p99_ms']:.1f} ({figures['gap_p99_ms'] / peer['gap_p99_ms']:.2f})",
            )
        made.add_section()
    yield made
    grown = Table(title="Growth of maps, as the exponent of their items: 1 is linear")
    for column in ("", *(f"{items} items\ns" for items in plan.maps), "exponent\nof time", "exponent\nof CPU"):
        grown.add_column(column, justify="right" if column else "left")
    for contender in (OWN, PEER):
        exponents = growth(summary, contender, plan)
        seconds = [f"{summary[f'map of {items}'][contender]['seconds']:.2f}" for items in plan.maps]
        grown.add_row(contender, *seconds, f"{exponents['seconds']:.2f}", f"{exponents['cpu']:.2f}")
    yield grown


if __name__ == "__main__":
    raise SystemExit(main())
