"""The diff of definitions: added, removed, changed and reordered values, with their paths."""

from __future__ import annotations

from typing import Any

import pytest

from app.workflows.language import diff
from app.workflows.language.diff import DefinitionChange


def flow(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"workflow": "w", **more, "steps": [{"kind": "noop", **step} for step in steps]}


A, B = {"id": "a"}, {"id": "b", "needs": ["a"]}
SCHEMA = {"type": "object", "properties": {"x": {}, "y": {}}}


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        (flow(A, B), flow(A, B), []),
        (flow(A), flow(A, B), [DefinitionChange("added", "steps.b", None, {"kind": "noop", "needs": ["a"]})]),
        (flow(A, B), flow(A), [DefinitionChange("removed", "steps.b", {"kind": "noop", "needs": ["a"]}, None)]),
        (flow(A, B), flow(B, A), [DefinitionChange("reordered", "steps", ["a", "b"], ["b", "a"])]),
        (
            flow({"id": "a", "retry": {"max_attempts": 3, "cap": "1m"}}, B),
            flow({"id": "c"}, B, {"id": "a", "retry": {"max_attempts": 5, "delay": "2s"}}),
            [
                DefinitionChange("added", "steps.c", None, {"kind": "noop"}),
                DefinitionChange("changed", "steps.a.retry.max_attempts", 3, 5),
                DefinitionChange("added", "steps.a.retry.delay", None, "2s"),
                DefinitionChange("removed", "steps.a.retry.cap", "1m", None),
                DefinitionChange("reordered", "steps", ["a", "b"], ["b", "a"]),
            ],
        ),
        (flow(A, description="x"), flow(A, description="y"), [DefinitionChange("changed", "description", "x", "y")]),
        (flow(B), flow({**B, "needs": []}), [DefinitionChange("changed", "steps.b.needs", ["a"], [])]),
        (
            flow({**A, "messages": [{"role": "user", "content": "x"}]}),
            flow({**A, "messages": [{"role": "user", "content": "y"}, {"role": "user", "content": "z"}]}),
            [
                DefinitionChange("changed", "steps.a.messages[0].content", "x", "y"),
                DefinitionChange("added", "steps.a.messages[1]", None, {"role": "user", "content": "z"}),
            ],
        ),
        (
            flow({**A, "kind": "map", "step": {"kind": "noop", "timeout": "1m"}}),
            flow({**A, "kind": "map", "step": {"kind": "noop", "timeout": "2m"}}),
            [DefinitionChange("changed", "steps.a.step.timeout", "1m", "2m")],
        ),
        (
            flow(A, on_failure=[{"id": "z"}]),
            flow(A, on_failure=[]),
            [DefinitionChange("removed", "on_failure.z", {}, None)],
        ),
        (flow(A, inputs={"n": {"default": 1}}), flow(A, inputs={"n": {"default": True}}), None),
        (
            flow({**A, "output": {"schema": SCHEMA}}),
            flow({**A, "output": {"schema": {**SCHEMA, "properties": {"y": {}, "x": {}}}}}),
            [DefinitionChange("reordered", "steps.a.output.schema.properties", ["x", "y"], ["y", "x"])],
        ),
    ],
)
def test_each_difference_is_reported_once_with_its_path(
    old: dict[str, Any], new: dict[str, Any], changes: list[DefinitionChange] | None
) -> None:
    expected = [DefinitionChange("changed", "inputs.n.default", 1, True)] if changes is None else changes

    assert diff.between(old, new) == expected
