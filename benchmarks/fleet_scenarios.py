"""
The scenarios of the scheduling benchmark: those with recorded arrivals, and seven that press on one weakness each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from random import Random

from app.kernel.priority import Priority
from app.scheduler.planner.arrivals import ArrivalPattern
from app.scheduler.planner.cluster import Configuration
from benchmarks.fleet_values import Failure, Request, Workload, instant
from benchmarks.fleet_workloads import (
    USABLE,
    Arrivals,
    Scenario,
    chat,
    draw_class,
    fragmented,
    gpus,
    heavy_tenant,
    large_among_small,
    mixed_fleet,
    model,
    ping_pong,
    pipelines,
    reserved,
    tenants,
    wrong_sizes,
    zipf,
)


class _Source:
    """Draws requests; lengths of prompts and answers are those of the traces."""

    def __init__(self, arrivals: Arrivals, chance: Random) -> None:
        self._chance, self._length = chance, arrivals.length
        self._lengths = [(prompt, answer) for _, prompt, answer in arrivals.thinned(chance, 2.0)]
        self.requests: list[Request] = []

    def ask(self, model_: str, priority: Priority, namespace: str, time: float) -> None:
        """One request, unless its time is past the end of the arrivals."""
        if time < self._length:
            prompt, answer = self._chance.choice(self._lengths)
            self.requests.append(Request(model_, priority, namespace, time, prompt, answer))

    def times(self, rate: float) -> list[float]:
        """Poisson arrivals at so many a second."""
        found, time = [], 0.0
        while (time := time + self._chance.expovariate(rate)) < self._length:
            found.append(time)
        return found

    def workload(self, devices: int, models: list[Configuration]) -> Workload:
        self.requests.sort(key=lambda request: request.ready)
        return Workload(gpus((USABLE,) * devices), tuple(models), tuple(self.requests), self._length)


def flood() -> Scenario:
    """Batch requests keep four models busy all the time; interactive ones for five others come now and then."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        source = _Source(arrivals, chance)
        busy = [model(f"batch-{n}", 10) for n in range(4)]
        others = [model(f"chat-{n}", size) for n, size in enumerate((6, 7, 8, 9, 10))]
        for time in source.times(1.6):
            source.ask(chance.choice(busy).id, Priority.BATCH, "files", time)
        for time in source.times(0.08):
            source.ask(chance.choice(others).id, Priority.INTERACTIVE, f"person-{chance.randrange(4)}", time)
        return source.workload(2, [*busy, *others])

    return make


def scan() -> Scenario:
    """One tenant goes through all models in turn, again and again, beside people who use two of them."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        source = _Source(arrivals, chance)
        models = [model(f"s{n}", chance.uniform(5, 10)) for n in range(12)]
        for time in source.times(0.25):
            source.ask(chance.choice(models[:2]).id, Priority.INTERACTIVE, f"person-{chance.randrange(3)}", time)
        for begin in range(0, int(arrivals.length), 120):
            for n, each in enumerate(chance.sample(models, len(models))):
                source.ask(each.id, Priority.BATCH, "scan", begin + 5.0 * n)
        return source.workload(2, models)

    return make


def alternate() -> Scenario:
    """Twice as many models as fit, each requested as often as the others."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        source = _Source(arrivals, chance)
        models = [model(f"a{n}", 9) for n in range(8)]
        for n, time in enumerate(source.times(0.2)):
            source.ask(models[n % 8].id, draw_class(chance), f"tenant-{n % 3}", time)
        return source.workload(2, models)

    return make


def overload(rate: float) -> Scenario:
    """A model that fills a device gets more requests than one pool serves; six others share the fleet with it."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        source = _Source(arrivals, chance)
        large = model("large", 20)
        others = [model(f"o{n}", size) for n, size in enumerate((5, 6, 7, 8, 9, 10))]
        pick = zipf(chance, [one.id for one in others], 0.5)
        for time in source.times(rate):
            source.ask(large.id, Priority.STANDARD, "crowd", time)
        for time in source.times(0.3):
            source.ask(pick(), draw_class(chance), f"tenant-{chance.randrange(4)}", time)
        return source.workload(3, [large, *others])

    return make


def rare(gap: Callable[[Random], float]) -> Scenario:
    """Three models that load for a minute, each requested about every ten minutes, beside five that are used much."""

    def make(arrivals: Arrivals, seed: int) -> Workload:
        chance = Random(seed)
        source = _Source(arrivals, chance)
        slow = [model(f"slow-{n}", 9) for n in range(3)]
        slow = [
            replace(one, layouts=tuple(replace(each, load=timedelta(seconds=60)) for each in one.layouts))
            for one in slow
        ]
        busy = [model(f"busy-{n}", size) for n, size in enumerate((5, 6, 7, 8, 10))]
        pick = zipf(chance, [one.id for one in busy], 0.7)
        for time in source.times(0.3):
            source.ask(pick(), draw_class(chance), f"tenant-{chance.randrange(4)}", time)
        before = {}
        for each in slow:
            # They were used in the same way before the run.
            last = time = -chance.uniform(0, 600)
            while (time := time + gap(chance)) < 0:
                last = time
            gaps = tuple(gap(chance) for _ in range(12))
            before[each.id] = ArrivalPattern(instant(last), Priority.INTERACTIVE, gaps)
            while time < arrivals.length:
                source.ask(each.id, Priority.INTERACTIVE, "rare", time)
                time += gap(chance)
        return replace(source.workload(2, [*busy, *slow]), arrivals=before)

    return make


FOUR, TWO = (USABLE,) * 4, (USABLE,) * 2
SCENARIOS: dict[str, Scenario] = {
    "zipf": chat(0.49, FOUR),
    "zipf-low": chat(0.24, FOUR),
    "zipf-2gpu": chat(0.12, TWO),
    "pipelines": pipelines(1 / 20, FOUR),
    "tenants": tenants(0.4, FOUR),
    "ping-pong": ping_pong(0.25),
    "large": large_among_small(0.8),
    "fragmented": fragmented(0.3),
    "heavy": heavy_tenant(1.0),
    "failures": chat(0.4, FOUR, (Failure(600, "gpu-1", 300), Failure(1500, "gpu-2", 600), Failure(1800, "gpu-0", 120))),
    "wrong-sizes": wrong_sizes(0.4, FOUR),
    "reserve": reserved(0.4, FOUR),
    "mixed": mixed_fleet(0.8),
    "flood": flood(),
    "scan": scan(),
    "alternate": alternate(),
    "overload": overload(0.75),
    "swamped": overload(1.4),
    "rare": rare(lambda chance: chance.gauss(600, 30)),
    "irregular": rare(lambda chance: chance.expovariate(1 / 600)),
}
#: What each scenario is.
TOLD: dict[str, str] = {
    "zipf": "10 models (126 GB) on 4 GPUs (88 GB), 0.49 requests a second, models by Zipf",
    "zipf-low": "the same at 0.24 a second",
    "zipf-2gpu": "10 models on 2 GPUs, 2.9 times their memory, 0.12 a second",
    "pipelines": "bursts of documents that go through three models each, 4 GPUs",
    "tenants": "twelve tenants with habits of their own, bursty, at work half of the time, 4 GPUs",
    "ping-pong": "two models that never fit together on one GPU, requested in turn",
    "large": "a model of two GPUs among nine small ones, 4 GPUs",
    "fragmented": "eight small models that are kept running and spread, and one that needs two GPUs nearly whole",
    "heavy": "one tenant floods three models, four others ask for one each, 2 GPUs, all of class standard",
    "failures": "as zipf at 0.4 a second; three GPUs fail for a while, one after the other",
    "wrong-sizes": "as zipf at 0.4 a second; footprints are up to 10 % wrong until measured",
    "reserve": "as zipf at 0.4 a second; a model that is rarely requested owns the bytes of one pool",
    "mixed": "40 models on 8 GPUs of four sizes (280 GB), 0.8 a second",
    "flood": "batch requests keep four models busy, and a trickle of interactive ones is for five others, 2 GPUs",
    "scan": "every two minutes one tenant asks each of twelve models in turn, beside people with two models, 2 GPUs",
    "alternate": "eight models of 9 GB on 2 GPUs that hold four, requested in turn",
    "overload": "a model that fills a GPU gets more than one pool serves, beside six others, 3 GPUs",
    "swamped": "the same, and it gets more than the whole fleet serves",
    "rare": "three models that take 60 s to load, each requested every ten minutes, beside five that are busy, 2 GPUs",
    "irregular": "the same, with exponential gaps of ten minutes on average",
}
