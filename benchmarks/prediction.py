"""
Prediction: whether the 80 % interval of a run's expected time holds the truth in 75 to 85 % of held-out runs.

    python -m benchmarks.prediction            # seeded simulations; no server, about a minute
    python -m benchmarks.prediction --real 240       # runs on real processes with simulated engines
    python -m benchmarks.prediction --planner zipf,tenants   # would the planner gain by predictions of each step?

A simulation is a stream of runs on models with few slots: chains, fans with a join, maps of a random number of items,
agents with a random number of turns. Prompts and texts have the lengths of log-normal distributions that depend on the
inputs, and the speed of a model depends on how many of its slots are used. The scenarios add what real fleets do:
bursts, a model that becomes half as fast, a workflow whose texts become three times as long, loads in between.
A run is predicted at its submission from what has ended before (prequentially): no run is predicted by itself. The
first 60 runs of each workflow are left out of the figures. Beside the coverage stands how wide the interval is, as the
ratio of its ends, and the error of the expected time; `mean` is what was there before: the mean time of the workflow's
last 50 runs, with the 80 % interval of a normal distribution.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2

from app.inference.prediction import forecast as forecasts
from app.inference.prediction.forecast import Basis, Learned
from app.inference.prediction.history import ModelHistory, StepSample, WorkflowHistory
from app.inference.prediction.learn import EndedRun, EndedStep, Knowledge, learn
from app.inference.prediction.residuals import Residuals
from app.inference.prediction.timeline import ModelSlots
from app.scheduler.planner.cluster import Pool
from app.scheduler.planner.policy import PlacementPolicy
from app.workflows.language import check
from app.workflows.language.definition import Definition
from benchmarks.fleet_scenarios import SCENARIOS as FLEETS
from benchmarks.fleet_simulator import Simulation
from benchmarks.fleet_values import Live
from benchmarks.fleet_workloads import Arrivals
from benchmarks.governance import ended, up
from benchmarks.scheduling import Arriero, figures

#: Runs of each workflow that are not counted: nothing was known at first.
_WARM_UP = 60
_WORKFLOWS = """
workflow: chain
defaults: {model: "a:1"}
steps:
  - {id: first, kind: generate, prompt: x}
  - {id: second, kind: generate, prompt: x, needs: [first]}
  - {id: third, kind: generate, prompt: x, needs: [second], model: "b:1"}
---
workflow: fan
defaults: {model: "a:1"}
steps:
  - {id: one, kind: generate, prompt: x}
  - {id: two, kind: generate, prompt: x}
  - {id: three, kind: generate, prompt: x, model: "b:1"}
  - {id: end, kind: generate, prompt: x, needs: [one, two, three]}
---
workflow: spread
inputs: {list: {type: array}}
steps:
  - {id: each, kind: map, over: inputs.list, max_parallel: 8, step: {kind: generate, model: "a:1", prompt: x}}
  - {id: end, kind: generate, model: "b:1", prompt: x, needs: [each]}
---
workflow: helper
steps:
  - {id: work, kind: agent, model: "b:1", prompt: x, tools: [{workflow: total-of-prices}]}
"""


@dataclass(slots=True)
class _Step:
    key: str
    needs: tuple[str, ...]
    model: str
    #: Tokens in and out of each item, one after the other for an agent.
    work: list[tuple[int, int]]
    kind: str
    parallel: int
    missing: int = 0
    waiting: list[tuple[int, int]] = field(default_factory=list)
    running: int = 0
    ready: float = 0.0
    began: float | None = None
    ended: float | None = None
    samples: list[StepSample] = field(default_factory=list)


@dataclass(slots=True)
class _Run:
    number: int
    definition: Definition
    inputs_bytes: int
    submitted: float
    steps: dict[str, _Step]
    expected: dict[str, Any] | None = None
    mean: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """A stream of runs."""

    name: str
    #: The share of the slots that is used on average.
    load: float = 0.6
    #: After half of the runs the model `a:1` is so many times slower, and texts of `chain` so many times longer.
    slower: float = 1.0
    longer: float = 1.0
    #: Runs come in bursts of up to that many.
    burst: int = 1
    #: The standard deviation of the logarithm of the length of a text.
    spread: float = 0.5


SCENARIOS = (
    Scenario("steady"),
    Scenario("idle", load=0.1),
    Scenario("crowded", load=0.9),
    Scenario("bursts", burst=12),
    Scenario("slower model", slower=2.0),
    Scenario("longer texts", longer=3.0),
    Scenario("wild lengths", spread=1.0),
)


class _Simulation:
    """Runs on models with slots; what is learned, and what was predicted."""

    def __init__(self, scenario: Scenario, definitions: Sequence[Definition], seed: int, runs: int) -> None:
        self.scenario, self.definitions, self.random = scenario, definitions, random.Random(seed)
        self.runs = runs
        self.slots = {"a:1": 4, "b:1": 2}
        self.busy = dict.fromkeys(self.slots, 0)
        self.queue: dict[str, list[tuple[_Run, _Step, tuple[int, int]]]] = {name: [] for name in self.slots}
        self.events: list[tuple[float, int, str, Any]] = []
        self.numbers = itertools.count()
        self.knowledge: dict[str, Knowledge] = {}
        self.models: dict[str, ModelHistory] = {}
        self.groups: dict[Basis, Residuals] = {}
        self.times: dict[str, list[float]] = defaultdict(list)
        self.results: dict[str, list[dict[str, float]]] = defaultdict(list)
        self.steps: list[bool] = []

    def play(self) -> None:
        at, number = 0.0, 0
        while number < self.runs:
            for _ in range(self.random.randint(1, self.scenario.burst)):
                self._later(at, "submit", number)
                number += 1
            # A run takes about 11 s of slots of `a:1` and 8 s of `b:1`; `b:1` has two of them.
            longer = math.exp((self.scenario.spread**2 - 0.25) / 2)
            pause = 4.5 / self.scenario.load * longer * (1 + self.scenario.burst) / 2
            at += self.random.expovariate(1 / pause)
        while self.events:
            now, _, kind, what = heapq.heappop(self.events)
            if kind == "submit":
                self._submit(now, what)
            else:
                self._end_item(now, *what)

    def _later(self, at: float, kind: str, what: Any) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), kind, what))

    def _is_late(self, number: int) -> bool:
        return number >= self.runs // 2

    def _tokens(self, middle: float) -> int:
        return max(round(middle * self.random.lognormvariate(0, self.scenario.spread)), 1)

    def _submit(self, now: float, number: int) -> None:
        definition = self.random.choice(self.definitions)
        size = round(self.random.lognormvariate(6, 0.8))
        count = self.random.randint(2, 24)
        run = _Run(number, definition, size if definition.workflow != "spread" else count * 60, now, {})
        longer = self.scenario.longer if definition.workflow == "chain" and self._is_late(number) else 1.0
        for step in definition.steps:
            items = count if step.kind == "map" else self.random.randint(1, 7) if step.kind == "agent" else 1
            work = [(self._tokens(size / 4 + 50), self._tokens((40 + size / 20) * longer)) for _ in range(items)]
            body: Any = step.step if step.kind == "map" else step
            parallel = step.max_parallel if step.kind == "map" else 1
            model = body.model or definition.defaults.model or ""
            one = _Step(step.id, step.needs, model, work, step.kind, parallel, len(step.needs))
            run.steps[step.id] = one
        self._predict(run)
        for one in run.steps.values():
            if not one.missing:
                self._ready(now, run, one)

    def _ready(self, now: float, run: _Run, step: _Step) -> None:
        step.ready, step.waiting = now, list(step.work)
        for _ in range(min(step.parallel, len(step.work))):
            self.queue[step.model].append((run, step, step.waiting.pop(0)))
        self._fill(now, step.model)

    def _fill(self, now: float, model: str) -> None:
        while self.queue[model] and self.busy[model] < self.slots[model]:
            run, step, (tokens_in, tokens_out) = self.queue[model].pop(0)
            self.busy[model] += 1
            step.began = now if step.began is None else step.began
            slow = self.scenario.slower if model == "a:1" and self._is_late(run.number) else 1.0
            # Slots share the device: four of them together are about twice as fast as one.
            share = 1 + 0.35 * (self.busy[model] - 1)
            first = tokens_in / 900 * slow * share
            seconds = first + tokens_out / 40 * slow * share * self.random.uniform(0.9, 1.1)
            sample = StepSample(seconds, model, tokens_in, 0, tokens_out, first, now - step.ready)
            self._later(now + seconds, "end", (run, step, sample))

    def _end_item(self, now: float, run: _Run, step: _Step, sample: StepSample) -> None:
        self.busy[step.model] -= 1
        step.samples.append(sample)
        if step.waiting:
            self.queue[step.model].append((run, step, step.waiting.pop(0)))
        elif len(step.samples) == len(step.work):
            step.ended = now
            for other in run.steps.values():
                if step.key in other.needs:
                    other.missing -= 1
                    if not other.missing:
                        self._ready(now, run, other)
            if all(one.ended is not None for one in run.steps.values()):
                self._end(now, run)
        self._fill(now, step.model)

    def _known(self, name: str) -> Knowledge:
        return self.knowledge.setdefault(name, Knowledge(WorkflowHistory(), self.models, self.groups))

    def _predict(self, run: _Run) -> None:
        known = self._known(run.definition.workflow)
        slots = {}
        for name, count in self.slots.items():
            model = self.models.get(name, ModelHistory())
            duration = model.seconds(model.prompt.mean, model.text.mean) if model.is_known else 5.0
            ahead = len(self.queue[name])
            free_in = 0.0 if not ahead and self.busy[name] < count else (ahead + 1) / count * duration
            slots[name] = ModelSlots(count, free_in, model.wait.mean)
        learned = Learned(known.workflow, self.models, slots, self.groups)
        run.expected = forecasts.as_stored(forecasts.forecast(run.definition, learned, run.inputs_bytes))
        before = self.times[run.definition.workflow][-50:]
        if len(before) > 10:
            mean, deviation = statistics.mean(before), statistics.stdev(before)
            run.mean = mean, max(mean - 1.2816 * deviation, 0.0), mean + 1.2816 * deviation

    def _end(self, now: float, run: _Run) -> None:
        seconds, name = now - run.submitted, run.definition.workflow
        expected = run.expected
        assert expected is not None
        if len(self.times[name]) >= _WARM_UP and run.mean is not None:
            mean, low, high = run.mean
            self.results[name].append(
                {
                    "hit": float(expected["low"] <= seconds <= expected["high"]),
                    "ratio": expected["high"] / max(expected["low"], 0.05),
                    "error": abs(expected["seconds"] - seconds) / seconds,
                    "score": _interval_score(expected["low"], expected["high"], seconds),
                    "mean_hit": float(low <= seconds <= high),
                    "mean_error": abs(mean - seconds) / seconds,
                    "mean_score": _interval_score(low, high, seconds),
                }
            )
        self.times[name].append(seconds)
        ended = [
            EndedStep(
                step.key,
                True,
                samples=[StepSample((step.ended or now) - (step.began or now))]
                if step.kind == "agent"
                else [one if step.needs else StepSample(*_without_wait(one)) for one in step.samples[:20]],
                items=len(step.work) if step.kind == "map" else None,
            )
            for step in run.steps.values()
        ]
        known = self._known(name)
        learn(known, EndedRun(run.inputs_bytes, seconds, expected, ended))


def _without_wait(sample: StepSample) -> tuple[Any, ...]:
    return sample.seconds, sample.model, sample.tokens_in, 0, sample.tokens_out, sample.first_token, None


def _interval_score(low: float, high: float, truth: float) -> float:
    """Return the interval score of Gneiting and Raftery 2007 over the truth: less is better."""
    missed = max(low - truth, 0.0) + max(truth - high, 0.0)
    return (high - low + 2 / 0.2 * missed) / truth


def measured(scenario: Scenario, seeds: Sequence[int], runs: int) -> dict[str, Any]:
    """Return the figures of a scenario over some seeds."""
    definitions = [check.parse(text) for text in _WORKFLOWS.split("---")]
    found: list[dict[str, float]] = []
    by_workflow: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        simulation = _Simulation(scenario, definitions, seed, runs)
        simulation.play()
        for name, results in simulation.results.items():
            found += results
            by_workflow[name] += [one["hit"] for one in results]
    mean = {key: statistics.fmean(one[key] for one in found) for key in ("hit", "mean_hit")}
    middle = {key: statistics.median(one[key] for one in found) for key in found[0] if not key.endswith("hit")}
    workflows = {name: round(statistics.fmean(hits), 3) for name, hits in sorted(by_workflow.items())}
    figures = {key: round(value, 3) for key, value in {**mean, **middle}.items()}
    return {"scenario": scenario.name, "runs": len(found), **figures, "coverage_by_workflow": workflows}


class _Informed(Simulation):
    """A fleet whose planner knows the very times of the requests: the most that a prediction could bring."""

    def seen(self, pool: Live) -> Pool:
        known = super().seen(pool)
        if not pool.work:
            return known
        left = (max(ends for ends, _, _ in pool.work) - pool.clock) / max(pool.rate, 1e-9)
        return replace(known, work_left=timedelta(seconds=left))


def planner_bound(names: Sequence[str], seeds: Sequence[int], length: float) -> Iterator[str]:
    """Yield a table: the planner with mean times, and with the true ones, on the scenarios of benchmarks.scheduling."""
    yield "| scenario | served in time, means | served in time, true times | interactive p99, means | true times |"
    yield "|---|---|---|---|---|"
    arrivals = Arrivals(None, length)
    for name in names:
        found = {
            kind: [figures(kind(FLEETS[name](arrivals, seed), Arriero(PlacementPolicy())).run()) for seed in seeds]
            for kind in (Simulation, _Informed)
        }
        shown = [
            statistics.fmean(one[key] for one in found[kind])
            for key in ("in_time", "interactive_p99")
            for kind in (Simulation, _Informed)
        ]
        yield f"| {name} | {shown[0]:.1f} % | {shown[1]:.1f} % | {shown[2]:.1f} s | {shown[3]:.1f} s |"


def real(seconds: float, seed: int) -> dict[str, Any]:
    """Return the coverage of runs on real processes with simulated engines: a chain and a map, at random instants."""
    chance, ids = random.Random(seed), []
    prompt, model = "{{ inputs.topic }}", "main:1"
    write = {"id": "write", "kind": "generate", "model": model, "prompt": prompt, "max_tokens": 200}
    end = {**write, "id": "end", "prompt": "{{ steps.write.output }}", "needs": ["write"], "max_tokens": 60}
    each = {"id": "each", "kind": "map", "over": "inputs.list", "max_parallel": 4}
    each["step"] = {"kind": "generate", "model": model, "prompt": "{{ item }}", "max_tokens": 40}
    text, list_ = {"topic": {"type": "string"}}, {"list": {"type": "array"}}
    definitions = (
        {"workflow": "chain", "inputs": text, "steps": [write, end]},
        {"workflow": "spread", "inputs": list_, "steps": [each]},
    )
    with up({"predictions.learn_every": "1s"}, 1) as tree, httpx2.Client(base_url=tree.url, timeout=30) as client:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            number = chance.randrange(2)
            words = ["word " * chance.randint(1, 120) for _ in range(chance.randint(1, 6))]
            inputs = {"topic": words[0]} if number == 0 else {"list": words}
            answer = client.post("/v1/runs", json={"definition": definitions[number], "inputs": inputs})
            ids.append(answer.raise_for_status().json()["id"])
            time.sleep(chance.expovariate(1.5))
        runs = ended(client, ids)
    found = []
    for name in ("chain", "spread"):
        of = [run for run in runs if run["workflow"] == name and run["state"] == "succeeded" and run["expected"]]
        found += [run for run in of[30:] if run["expected"]["basis"] == "history"]
    hits = [run["expected"]["low"] <= run["took_s"] <= run["expected"]["high"] for run in found]
    errors = [abs(run["expected"]["seconds"] - run["took_s"]) / max(run["took_s"], 0.01) for run in found]
    ratio = [run["expected"]["high"] / max(run["expected"]["low"], 0.05) for run in found]
    figures_ = {"hit": statistics.fmean(hits), "error": statistics.median(errors), "ratio": statistics.median(ratio)}
    return {"runs": len(found), **{key: round(value, 3) for key, value in figures_.items()}}


def _rows(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| scenario | held-out runs | coverage | of the mean | high/low | error | of the mean | score | of the mean |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in results:
        yield (
            f"| {one['scenario']} | {one['runs']:,} | {one['hit']:.1%} | {one['mean_hit']:.1%} | {one['ratio']:.1f} "
            f"| {one['error']:.0%} | {one['mean_error']:.0%} | {one['score']:.2f} | {one['mean_score']:.2f} |"
        )


def main() -> None:
    """Run the scenarios, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1200, help="runs of each simulation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--real", type=float, metavar="SECONDS", help="only: runs on real processes, for so long")
    parser.add_argument("--planner", metavar="SCENARIO,...", help="only: the planner with the true times of requests")
    given = parser.parse_args()
    if given.real:
        print(json.dumps(real(given.real, 11)))
        return
    if given.planner:
        for line in planner_bound(given.planner.split(","), range(11, 11 + given.seeds), 1200.0):
            print(line)
        return
    results = [measured(scenario, range(given.seeds), given.runs) for scenario in SCENARIOS]
    for line in _rows(results):
        print(line)
    for one in results:
        print(one["scenario"], json.dumps(one["coverage_by_workflow"]))
    if given.json:
        given.json.write_text(json.dumps({"scenarios": results}, indent=1))


if __name__ == "__main__":
    main()
