"""
Machines, models and arrivals for the simulated fleet.

Arrivals and token counts are those of the Azure LLM inference traces of 2023 (conversation and code) when a folder
holds them, else drawn by a seeded generator with the same rates, spreads and lengths. No trace says which model a
request was for: models, classes and tenants are drawn by seed, models by Zipf's law over a shuffled list.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random

from app.devices.device import HardwareKind
from app.fleet.pool import PoolState
from app.footprint.layout import KnownLayout
from app.kernel.priority import Priority
from app.scheduler.planner.cluster import (
    Account,
    Cluster,
    Configuration,
    Device,
    Packing,
    Pool,
    Reserve,
)
from app.scheduler.planner.demand import WaitingSteps
from benchmarks.fleet_values import EPOCH, Failure, Request, Workload

GB = 10**9
#: Bytes a second from the disk to a device, and seconds that a process needs before and after.
BANDWIDTH, START_UP = 2.2 * GB, 2.0
#: The models of most scenarios, 126 GB in all: file and cache, in GB.
SIZES = (0.9, 1.6, 2.6, 4.4, 5.5, 8.4, 11.0, 18.6, 31.0, 42.0)
#: Bytes of a device of 24 GB that reservations may come to.
USABLE = 22.0
#: Shares of the classes where the scenario says nothing else.
CLASSES = ((Priority.INTERACTIVE, 0.6), (Priority.STANDARD, 0.2), (Priority.BATCH, 0.2))

Arrival = tuple[float, int, int]
#: Makes a workload from a source of arrivals and a seed.
Scenario = Callable[["Arrivals", int], Workload]


def gpus(sizes: Sequence[float], per_host: int = 2) -> tuple[Device, ...]:
    """Simulated GPUs with so many usable GB each."""
    return tuple(
        Device(
            id=f"gpu-{n}",
            name=f"gpu-{n}",
            host=f"host-{n // per_host}",
            kind=HardwareKind.SIMULATED,
            type="sim",
            capacity_bytes=int(size * GB),
        )
        for n, size in enumerate(sizes)
    )


def model(name: str, size: float, largest: float = USABLE, slots: int = 4, **more: object) -> Configuration:
    """A model of so many GB. It is split over the fewest devices that hold it, one host's."""
    parts = max(1, math.ceil(size / largest))
    layout = KnownLayout(
        configuration=name,
        type="sim",
        source="measured",
        parts=(int(size * GB / parts),) * parts,
        load=timedelta(seconds=START_UP + size * GB / BANDWIDTH),
        # Decoding reads every weight for each token, from memory with about 800 GB/s; four slots share a pass.
        tokens_per_second=min(120.0, 560.0 / size),
    )
    return Configuration(id=name, model=name, slots=slots, layouts=(layout,), **more)  # type: ignore[arg-type]  # its fields, by name


def ten_models() -> list[Configuration]:
    return [model(f"m{size}", size) for size in SIZES]


@cache
def recorded(folder: Path | None, name: str) -> tuple[Arrival, ...]:
    """Arrivals of a trace, in seconds from its beginning, with tokens of prompt and answer."""
    file = folder / f"AzureLLMInferenceTrace_{name}.csv" if folder else None
    if file is None or not file.is_file():
        return generated(name)
    with file.open(newline="") as text:
        rows = [(datetime.fromisoformat(t[:26]), int(p), int(a)) for t, p, a in list(csv.reader(text))[1:]]
    return tuple(((time - rows[0][0]).total_seconds(), prompt, answer) for time, prompt, answer in rows)


def generated(name: str) -> tuple[Arrival, ...]:
    """A stand-in: gamma intervals and log-normal lengths with the means and spreads of the trace."""
    chance = Random(name)
    rate, spread, prompts, answers = (5.53, 1.09, (1155, 0.9), (211, 0.7)) if name == "conv" else (
        2.57, 6.0, (2048, 1.0), (28, 1.3)
    )  # fmt: skip
    shape = 1 / spread**2
    time, rows = 0.0, []
    while time < 3500:
        time += chance.gammavariate(shape, 1 / rate / shape)
        lengths = [max(1, int(m * math.exp(chance.gauss(-s * s / 2, s)))) for m, s in (prompts, answers)]
        rows.append((time, min(lengths[0], 7500), min(lengths[1], 1000)))
    return tuple(rows)


@dataclass(frozen=True)
class Arrivals:
    """Where arrivals come from."""

    folder: Path | None
    #: Seconds of each run.
    length: float

    @property
    def told(self) -> str:
        found = self.folder is not None and (self.folder / "AzureLLMInferenceTrace_conv.csv").is_file()
        return "Azure LLM inference traces 2023 (CC-BY 4.0)" if found else "seeded generator (no traces were given)"

    def thinned(self, chance: Random, rate: float, names: Sequence[str] = ("conv", "code")) -> list[Arrival]:
        """A random part of the traces that comes to `rate` a second."""
        rows = sorted(row for name in names for row in recorded(self.folder, name))
        share = rate / (len(rows) / rows[-1][0])
        begin = chance.uniform(0, max(rows[-1][0] - self.length, 0))
        kept = (row for row in rows if begin <= row[0] < begin + self.length and chance.random() < share)
        return [(time - begin, prompt, answer) for time, prompt, answer in kept]


def zipf(chance: Random, names: Sequence[str], power: float = 1.0) -> Callable[[], str]:
    """Draws names, the first of a shuffled list most often."""
    shuffled = chance.sample(list(names), len(names))
    sums = list(accumulate((rank + 1) ** -power for rank in range(len(shuffled))))
    return lambda: shuffled[bisect_left(sums, chance.random() * sums[-1])]


def draw_class(chance: Random, classes: Sequence[tuple[Priority, float]] = CLASSES) -> Priority:
    at = chance.random()
    for priority, share in classes:
        at -= share
        if at < 0:
            return priority
    return classes[-1][0]


def chat(rate: float, sizes: Sequence[float], failures: Sequence[Failure] = ()) -> Scenario:
    """Zipf over ten models."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        models = ten_models()
        if max(sizes) * len(sizes) < 44:
            models = [m for m in models if m.layouts[0].total_bytes <= 44 * GB]
        pick = zipf(chance, [m.id for m in models])
        requests = [
            Request(pick(), draw_class(chance), f"tenant-{chance.randrange(4)}", time, prompt, answer)
            for time, prompt, answer in arrivals.thinned(chance, rate)
        ]
        return Workload(gpus(sizes), tuple(models), tuple(requests), arrivals.length, tuple(failures))

    return make


def pipelines(rate: float, sizes: Sequence[float]) -> Scenario:
    """Bursts of 6 to 24 documents, each of which goes through three models."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        models = [m for m in ten_models() if m.layouts[0].total_bytes <= 20 * GB]
        lengths = [(p, a) for _, p, a in arrivals.thinned(chance, 2.0)]
        pick = zipf(chance, [m.id for m in models], 0.7)
        requests: list[Request] = []
        time = chance.expovariate(rate)
        while time < arrivals.length:
            stages = [pick()]
            while len(stages) < 3:
                if (another := pick()) not in stages:
                    stages.append(another)
            priority = draw_class(chance, ((Priority.STANDARD, 0.4), (Priority.BATCH, 0.6)))
            documents = chance.randint(6, 24)
            if chance.random() < 0.5:  # a person waits for a small one
                priority, documents = Priority.INTERACTIVE, chance.randint(1, 4)
            for _ in range(documents):
                first, *rest = [(stage, *chance.choice(lengths)) for stage in stages]
                requests.append(Request(first[0], priority, "jobs", time, first[1], first[2], tuple(rest)))
            time += chance.expovariate(rate)
        return Workload(gpus(sizes), tuple(models), tuple(requests), arrivals.length)

    return make


def tenants(rate: float, sizes: Sequence[float]) -> Scenario:
    """Twelve tenants with models of their own habit, each with gamma arrivals of another spread, that come and go."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        models = ten_models()
        lengths = [(p, a) for _, p, a in arrivals.thinned(chance, 2.0)]
        weights = [1 / (n + 1) for n in range(12)]
        requests: list[Request] = []
        for n, weight in enumerate(weights):
            pick = zipf(chance, [m.id for m in chance.sample(models, 3)], 1.5)
            spread = chance.choice((0.8, 1.5, 3.0, 5.0))
            own, shape = rate * weight / sum(weights), 1 / spread**2
            phase, period = chance.random(), chance.uniform(400, 1500)
            priority = draw_class(chance)
            time = 0.0
            while True:
                time += chance.gammavariate(shape, 1 / (2 * own) / shape)
                if time >= arrivals.length:
                    break
                if (time / period + phase) % 1 < 0.5:  # it is at work half of the time
                    prompt, answer = chance.choice(lengths)
                    requests.append(Request(pick(), priority, f"tenant-{n}", time, prompt, answer))
        requests.sort(key=lambda r: r.ready)
        return Workload(gpus(sizes), tuple(models), tuple(requests), arrivals.length)

    return make


def ping_pong(rate: float) -> Scenario:
    """Two models that never fit together, requested in turn."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        models = [model("a", 14), model("b", 15)]
        lengths = [(p, a) for _, p, a in arrivals.thinned(chance, 2.0)]
        requests, time = [], 0.0
        while (time := time + chance.expovariate(rate)) < arrivals.length:
            prompt, answer = chance.choice(lengths)
            name = "ab"[len(requests) % 2]
            requests.append(Request(name, draw_class(chance), f"tenant-{name}", time, prompt, answer))
        return Workload(gpus((USABLE,), 1), tuple(models), tuple(requests), arrivals.length)

    return make


def large_among_small(rate: float) -> Scenario:
    """One model of two devices among many small ones that fill every device in part."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        small = [model(f"s{n}", size) for n, size in enumerate((3, 4, 4, 5, 5, 6, 7, 8, 9))]
        large = model("large", 38)
        lengths = [(p, a) for _, p, a in arrivals.thinned(chance, 2.0)]
        pick = zipf(chance, [m.id for m in small], 0.6)
        requests, time = [], 0.0
        while (time := time + chance.expovariate(rate)) < arrivals.length:
            prompt, answer = chance.choice(lengths)
            name = large.id if chance.random() < 0.08 else pick()
            requests.append(Request(name, draw_class(chance), f"tenant-{chance.randrange(4)}", time, prompt, answer))
        return Workload(gpus((USABLE,) * 4), (*small, large), tuple(requests), arrivals.length)

    return make


def fragmented(rate: float) -> Scenario:
    """Small models with targets, two on each device, and a large one that needs two devices almost whole."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        kept = [model(f"k{n}", 5, min_pools=1, packing=Packing.SPREAD) for n in range(8)]
        large = model("large", 30)
        lengths = [(p, a) for _, p, a in arrivals.thinned(chance, 2.0)]
        requests, time = [], 0.0
        while (time := time + chance.expovariate(rate)) < arrivals.length:
            prompt, answer = chance.choice(lengths)
            name = large.id if chance.random() < 0.1 else chance.choice(kept).id
            requests.append(Request(name, draw_class(chance), f"tenant-{chance.randrange(4)}", time, prompt, answer))
        return Workload(gpus((USABLE,) * 4), (*kept, large), tuple(requests), arrivals.length)

    return make


def heavy_tenant(rate: float) -> Scenario:
    """One tenant floods two models of its own; four others ask for other models now and then."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        models = ten_models()
        names = chance.sample([m.id for m in models if m.layouts[0].total_bytes < 20 * GB], 8)
        lengths = [(p, a) for _, p, a in arrivals.thinned(chance, 2.0)]
        requests: list[Request] = []
        time = 0.0
        while (time := time + chance.expovariate(rate)) < arrivals.length:
            prompt, answer = chance.choice(lengths)
            if chance.random() < 0.75:
                burst = 5 if chance.random() < 0.2 else 1
                names_drawn = [chance.choice(names[:3]) for _ in range(burst)]
                requests += [Request(n, Priority.STANDARD, "heavy", time, prompt, answer) for n in names_drawn]
            else:
                own = chance.randrange(4)
                name = names[3 + own]
                requests.append(Request(name, Priority.STANDARD, f"light-{own}", time, prompt, answer))
        return Workload(gpus((USABLE,) * 2), tuple(models), tuple(requests), arrivals.length)

    return make


def wrong_sizes(rate: float, sizes: Sequence[float]) -> Scenario:
    """As chat, with footprints that are up to 10 % wrong until a pool has measured them."""
    plain = chat(rate, sizes)

    def make(arrivals: Arrivals, seed: int) -> Workload:
        workload = plain(arrivals, seed)
        chance = Random(seed + 1)
        truth = {
            c.id: chance.uniform(0.9, min(1.1, USABLE * GB / c.layouts[0].parts[0])) for c in workload.configurations
        }
        return replace(workload, truth=truth)

    return make


def reserved(rate: float, sizes: Sequence[float]) -> Scenario:
    """As chat, with a rarely used model that owns the bytes of one pool."""
    plain = chat(rate, sizes)

    def make(arrivals: Arrivals, seed: int) -> Workload:
        workload = plain(arrivals, seed)
        counts = {c.id: sum(r.configuration == c.id for r in workload.requests) for c in workload.configurations}
        owner = min(
            (c for c in workload.configurations if 8 * GB < c.layouts[0].total_bytes < 20 * GB),
            key=lambda c: counts[c.id],
        )
        configurations = tuple(
            replace(c, reserve=Reserve(pools=1)) if c is owner else c for c in workload.configurations
        )
        return replace(workload, configurations=configurations)

    return make


def mixed_fleet(rate: float) -> Scenario:
    """Four hosts with devices of 12, 24, 48 and 80 GB, and 40 models."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        sizes = (11, 11, 22, 22, 45, 45, 76, 76)
        models = [
            model(
                f"x{n}", round(chance.choice((1, 2, 3, 5, 6, 9, 12, 20, 34, 44, 70)) * chance.uniform(0.9, 1.1), 1), 76
            )
            for n in range(40)
        ]
        pick = zipf(chance, [m.id for m in models])
        requests = [
            Request(pick(), draw_class(chance), f"tenant-{chance.randrange(6)}", time, prompt, answer)
            for time, prompt, answer in arrivals.thinned(chance, rate)
        ]
        return Workload(gpus(sizes), tuple(models), tuple(requests), arrivals.length)

    return make


def large_fleet(devices: int, models: int, steps: int, resident: float) -> tuple[Cluster, list[WaitingSteps], datetime]:
    """
    Hosts of eight devices of three types, nearly full, and steps that wait for every model, each in a group of its own.

    Only the part `resident` of the models has pools.
    """
    chance, now = Random(1), EPOCH
    usable = {"small": 22.0, "large": 76.0, "fast": 76.0}
    types = tuple(usable)
    fleet = tuple(
        Device(
            id=f"gpu-{n:04}",
            name=f"gpu-{n % 8}",
            host=f"host-{n // 8:03}",
            kind=HardwareKind.SIMULATED,
            type=types[n // 8 % 3],
            capacity_bytes=int(usable[types[n // 8 % 3]] * GB),
        )
        for n in range(devices)
    )
    configurations = []
    for number in range(models):
        size = chance.choice((1, 2, 4, 5, 8, 12, 18, 20, 40, 60, 130)) * chance.uniform(0.9, 1.1)
        made = [(kind, model(f"model-{number}", size, usable[kind] * 0.98).layouts[0]) for kind in types]
        layouts = tuple(replace(layout, type=kind) for kind, layout in made if len(layout.parts) <= 8)
        configurations.append(replace(model(f"model-{number}", size), layouts=layouts, max_pools=50))
    pools: list[Pool] = []
    free = {device.id: device.capacity_bytes for device in fleet}
    for _ in range(8 * devices):
        chosen = chance.choice(configurations[: max(int(models * resident), 1)])
        layout = chance.choice(chosen.layouts)
        host = chance.randrange(devices // 8) * 8
        some = chance.sample(fleet[host : host + 8], len(layout.parts))
        if some[0].type != layout.type or any(free[d.id] < part for d, part in zip(some, layout.parts, strict=True)):
            continue
        for device, part in zip(some, layout.parts, strict=True):
            free[device.id] -= part
        busy = chance.choice((0, 0, 0, 1, 2))
        pools.append(
            Pool(
                id=f"pool-{len(pools)}",
                configuration=chosen.id,
                state=PoolState.SERVING,
                bytes={device.id: part for device, part in zip(some, layout.parts, strict=True)},
                slots=4,
                started=now - timedelta(seconds=5000),
                busy=busy,
                serving=chance.choice(tuple(Priority)) if busy else None,
                work_left=timedelta(seconds=5 if busy else 0),
                loaded=now - timedelta(seconds=chance.uniform(50, 4000)),
                last_used=now - timedelta(seconds=chance.uniform(0, 200)),
            )
        )
    waiting = []
    for _ in range(steps):
        since = now - timedelta(seconds=chance.expovariate(1 / 20))
        name, tenant = chance.choice(configurations).id, f"tenant-{chance.randrange(20)}"
        waiting.append(WaitingSteps(name, chance.choice(tuple(Priority)), 1, since, None, tenant))
    halves = {c.model: chance.uniform(0, 2) / 2 for c in configurations}
    rates = {name: {Priority.INTERACTIVE: half, Priority.BATCH: half} for name, half in halves.items()}
    accounts = {f"tenant-{n}": Account(attained_seconds=chance.uniform(0, 1000)) for n in range(20)}
    return Cluster(fleet, tuple(pools), tuple(configurations), rates=rates, accounts=accounts), waiting, now
