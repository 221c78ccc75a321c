"""Growth: what costs more with more steps, rows waiting and rows kept; and what must not."""

from __future__ import annotations

import time

import pytest

from app.workflows import run as runs
from app.workflows.definition import Definition
from app.workflows.events import Command, ComputeOutput, DecideStep, Event, OutputComputed, RunSubmitted, StepDecided
from app.workflows.graph import Graph
from app.workflows.states import Run, RunState

#: Ten times as many may take so many times as long. A quadratic cost takes a hundred times as long.
LINEAR = 40.0


def chain(count: int, *, backwards: bool = False) -> Definition:
    steps = [{"id": "s0", "kind": "switch", "cases": {"a": "1 == 1"}}]
    steps += [
        {"id": f"s{n}", "kind": "switch", "cases": {"a": "1 == 1"}, "needs": [f"s{n - 1}.a"]} for n in range(1, count)
    ]
    return Definition.model_validate({"workflow": "w", "steps": steps[::-1] if backwards else steps})


def fan(count: int) -> Definition:
    steps = [{"id": "s0", "kind": "switch", "cases": {"a": "1 == 1"}}]
    steps += [{"id": f"s{n}", "kind": "switch", "cases": {"a": "1 == 1"}, "needs": ["s0"]} for n in range(1, count)]
    steps += [{"id": "end", "kind": "join", "needs": [f"s{n}" for n in range(1, count)], "join": "any"}]
    return Definition.model_validate({"workflow": "w", "steps": steps})


def seconds(definition: Definition, taken: str | None) -> float:
    """Until nothing is left to decide; `taken` is the branch that every switch takes. The least of three."""
    rules = Graph(definition).rules
    run = Run("r", RunState.QUEUED, {key: runs.begin(key, rule) for key, rule in rules.items()}, None, True)
    return min(_seconds(run, taken) for _ in range(3))


def _seconds(run: Run, taken: str | None) -> float:
    began, run = time.perf_counter(), runs.started(run)
    waiting: list[Event] = [RunSubmitted()]
    while waiting:
        advanced = runs.proceed(run, waiting.pop())
        run = advanced.run
        waiting += [event for command in advanced.commands if (event := _following(command, taken)) is not None]
    assert all(step.state in ("succeeded", "skipped", "ready") for step in run.steps.values())
    return time.perf_counter() - began


def _following(command: Command, taken: str | None) -> Event | None:
    match command:
        case DecideStep(key):
            return StepDecided(key, holds=True, switch=True, branch=taken)
        case ComputeOutput():
            return OutputComputed(made=True)
    return None


@pytest.mark.parametrize("taken", ["a", None])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_chain_of_switches_costs_by_its_length(taken: str | None, backwards: bool) -> None:
    """All of it is done under the lock of the run; where the first takes no branch, all others are skipped."""
    short, long = (seconds(chain(count, backwards=backwards), taken) for count in (500, 5_000))
    assert long < short * LINEAR


def test_a_fan_of_switches_into_one_join_costs_by_its_width() -> None:
    narrow, wide = (seconds(fan(count), "a") for count in (500, 5_000))
    assert wide < narrow * LINEAR
