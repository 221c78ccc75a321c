"""Work for a whole installation: definitions to submit, and what comes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Work:
    """Something to submit, and what comes of it."""

    name: str
    definition: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


def ask(model: str, tokens: int) -> Work:
    step = {"id": "write", "kind": "generate", "model": model, "prompt": "x", "max_tokens": tokens}
    return Work("generate", {"workflow": "ask", "steps": [step]})


def chain(length: int) -> Work:
    steps = [{"id": f"s{n}", "kind": "noop", "needs": [f"s{n - 1}"] if n else []} for n in range(length)]
    return Work("chain", {"workflow": "chain", "steps": steps})


def mapped(items: int) -> Work:
    each = {
        "id": "each", "kind": "map", "over": "inputs.numbers", "max_parallel": 8,
        "step": {"kind": "transform", "cel": "item * 2"},
    }  # fmt: skip
    count = {"id": "count", "kind": "transform", "needs": ["each"], "cel": "size(steps.each.output)"}
    inputs = {"numbers": {"type": "array"}}
    definition = {"workflow": "mapped", "inputs": inputs, "steps": [each, count],
                  "outputs": {"n": "steps.count.output"}}  # fmt: skip
    return Work("map", definition, {"numbers": list(range(items))}, {"n": items})


def large(megabytes: int) -> Work:
    """
    A text of so many megabytes goes in; as many come out, item by item of a map, and together as the output of the run.

    The longest values of all: one row of Postgres, written by the API and by a control worker.
    """
    parts = ["x" * 2**20] * megabytes
    copy = {"id": "copy", "kind": "map", "over": "inputs.parts", "step": {"kind": "transform", "cel": "item"}}
    definition = {"workflow": "large", "inputs": {"parts": {"type": "array"}}, "steps": [copy]}
    return Work("large", definition, {"parts": parts}, {"copy": parts})
