"""Workloads for an installation: definitions to submit, and their expected outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
    """A definition with its inputs and the expected output; None for any output."""

    name: str
    definition: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


def generate_text(model: str, tokens: int) -> Workload:
    step = {"id": "write", "kind": "generate", "model": model, "prompt": "x", "max_tokens": tokens}
    return Workload("generate", {"workflow": "ask", "steps": [step]})


def chain(length: int) -> Workload:
    steps = [{"id": f"s{n}", "kind": "noop", "needs": [f"s{n - 1}"] if n else []} for n in range(length)]
    return Workload("chain", {"workflow": "chain", "steps": steps})


def mapped(items: int) -> Workload:
    each = {
        "id": "each", "kind": "map", "over": "inputs.numbers", "max_parallel": 8,
        "step": {"kind": "transform", "cel": "item * 2"},
    }  # fmt: skip
    count = {"id": "count", "kind": "transform", "needs": ["each"], "cel": "size(steps.each.output)"}
    inputs = {"numbers": {"type": "array"}}
    definition = {"workflow": "mapped", "inputs": inputs, "steps": [each, count],
                  "outputs": {"n": "steps.count.output"}}  # fmt: skip
    return Workload("map", definition, {"numbers": list(range(items))}, {"n": items})


def large(megabytes: int) -> Workload:
    """
    An input of so many megabytes, which a map copies item by item into the output of the run.

    These are the largest values: one row of Postgres each, written by the API and by a control worker.
    """
    parts = ["x" * 2**20] * megabytes
    copy = {"id": "copy", "kind": "map", "over": "inputs.parts", "step": {"kind": "transform", "cel": "item"}}
    definition = {"workflow": "large", "inputs": {"parts": {"type": "array"}}, "steps": [copy]}
    return Workload("large", definition, {"parts": parts}, {"copy": parts})
