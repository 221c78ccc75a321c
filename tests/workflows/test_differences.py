"""Differences: what was added, removed, changed or only moved, with its path."""

from __future__ import annotations

from typing import Any

import pytest

from app.workflows import differences
from app.workflows.differences import Change


def flow(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"workflow": "w", **more, "steps": [{"kind": "noop", **step} for step in steps]}


A, B = {"id": "a"}, {"id": "b", "needs": ["a"]}
SCHEMA = {"type": "object", "properties": {"x": {}, "y": {}}}


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        (flow(A, B), flow(A, B), []),
        (flow(A), flow(A, B), [Change("added", "steps.b", None, {"kind": "noop", "needs": ["a"]})]),
        (flow(A, B), flow(A), [Change("removed", "steps.b", {"kind": "noop", "needs": ["a"]}, None)]),
        (flow(A, B), flow(B, A), [Change("reordered", "steps", ["a", "b"], ["b", "a"])]),
        (
            flow({"id": "a", "retry": {"max_attempts": 3, "cap": "1m"}}, B),
            flow({"id": "c"}, B, {"id": "a", "retry": {"max_attempts": 5, "delay": "2s"}}),
            [
                Change("added", "steps.c", None, {"kind": "noop"}),
                Change("changed", "steps.a.retry.max_attempts", 3, 5),
                Change("added", "steps.a.retry.delay", None, "2s"),
                Change("removed", "steps.a.retry.cap", "1m", None),
                Change("reordered", "steps", ["a", "b"], ["b", "a"]),
            ],
        ),
        (flow(A, description="x"), flow(A, description="y"), [Change("changed", "description", "x", "y")]),
        (flow(B), flow({**B, "needs": []}), [Change("changed", "steps.b.needs", ["a"], [])]),
        (
            flow({**A, "messages": [{"role": "user", "content": "x"}]}),
            flow({**A, "messages": [{"role": "user", "content": "y"}, {"role": "user", "content": "z"}]}),
            [
                Change("changed", "steps.a.messages[0].content", "x", "y"),
                Change("added", "steps.a.messages[1]", None, {"role": "user", "content": "z"}),
            ],
        ),
        (
            flow({**A, "kind": "map", "step": {"kind": "noop", "timeout": "1m"}}),
            flow({**A, "kind": "map", "step": {"kind": "noop", "timeout": "2m"}}),
            [Change("changed", "steps.a.step.timeout", "1m", "2m")],
        ),
        (flow(A, on_failure=[{"id": "z"}]), flow(A, on_failure=[]), [Change("removed", "on_failure.z", {}, None)]),
        (flow(A, inputs={"n": {"default": 1}}), flow(A, inputs={"n": {"default": True}}), None),
        (
            flow({**A, "output": {"schema": SCHEMA}}),
            flow({**A, "output": {"schema": {**SCHEMA, "properties": {"y": {}, "x": {}}}}}),
            [Change("reordered", "steps.a.output.schema.properties", ["x", "y"], ["y", "x"])],
        ),
    ],
)
def test_each_difference_is_told_once_with_its_path(
    old: dict[str, Any], new: dict[str, Any], changes: list[Change] | None
) -> None:
    expected = [Change("changed", "inputs.n.default", 1, True)] if changes is None else changes

    assert differences.between(old, new) == expected
