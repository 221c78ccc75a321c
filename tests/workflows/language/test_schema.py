"""The published JSON Schema: generated from the types, equal to the documented copy, valid for shipped workflows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app.kernel import shipped
from app.kernel.units import durations
from app.workflows import registry
from app.workflows.language import schema, source
from app.workflows.language.steps import KINDS

ROOT = Path(__file__).parents[3]
FILES = sorted([*registry.LIBRARY.rglob("*.yaml"), *shipped.folder("examples").glob("*.yaml")])


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema.workflow())
    return Draft202012Validator(schema.workflow())


def test_the_documented_schema_is_current() -> None:
    """Update it with: arriero workflows schema > docs/workflow.schema.json."""
    assert json.loads((ROOT / "docs/workflow.schema.json").read_text()) == schema.workflow()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_workflows_conform(path: Path, validator: Draft202012Validator) -> None:
    assert list(validator.iter_errors(source.read(path.read_text()).data)) == []


def test_every_kind_of_step_is_known_and_described() -> None:
    steps = schema.workflow()["properties"]["steps"]["items"]["discriminator"]["mapping"]

    assert set(steps) == set(KINDS)
    described = schema.workflow()["$defs"]
    assert all(described[reference.rpartition("/")[2]]["description"] for reference in steps.values())
    assert "skipped when it is false" in described["NoopStep"]["properties"]["when"]["description"]


def step(**fields: Any) -> dict[str, Any]:
    return {"workflow": "w", "steps": [{"id": "a", "kind": "noop", **fields}]}


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"workflow": "w", "steps": []},
        {"workflow": "My Flow", "steps": [{"id": "a", "kind": "noop"}]},
        step(id="A-1"),
        step(kind="think"),
        step(neds=["b"]),
        step(timeout="soon"),
        step(retry={"max_attempts": 0}),
        step(retry={"non_retryable": ["boredom"]}),
        step(kind="generate", prompt="x", sampling={"temperature": 9}),
        step(kind="switch", cases={"No Branch": "true"}),
        {**step(), "labels": {" ": "x"}},
        {**step(), "priority": "urgent"},
    ],
)
def test_invalid_documents_do_not_conform(document: dict[str, Any], validator: Draft202012Validator) -> None:
    assert not validator.is_valid(document)


@pytest.mark.parametrize("text", ["90", "1.5", "500ms", "15s", "1h30m", " 7D ", "soon", "1x", "", "-1s", "1h 30m", "s"])
def test_the_schema_accepts_exactly_the_valid_durations(text: str, validator: Draft202012Validator) -> None:
    try:
        durations.parse(text)
        read = True
    except ValueError:
        read = False

    assert validator.is_valid(step(timeout=text)) is read
