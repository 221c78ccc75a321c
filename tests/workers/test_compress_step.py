"""The execution of `compress` steps, with the vocabulary of a real model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.catalog import files
from app.kernel.errors import FailureReason, ModelFileUnusable, StepFailure
from app.workflows.expressions import conditions
from app.workflows.language import check, source
from app.workflows.language.check import Deployment
from app.workflows.language.compression import CompressFields
from app.workflows.state_machine.outcomes import Called, Success
from workers import compress_step
from workers.engine import OnStop
from workers.engine.engine import LlamaEngine
from workers.tokenizers import Tokenizers

NEVER: OnStop = lambda _: None  # noqa: E731 the annotation needs an assignment
MODEL = "smollm2:135m"
NOTES = [
    *(
        {"role": "user", "content": f"On day {i} it was really very cold, and {i * 7} people came to the mill."}
        for i in range(30)
    ),
    {"role": "user", "content": "The lease of the flat ends on 2027-03-31; write to huber@mail.example."},
]


@pytest.fixture(scope="module")
def tokenizers() -> Iterator[Tokenizers]:
    made = Tokenizers()
    yield made
    made.close()


def fields(**more: Any) -> CompressFields:
    return CompressFields.model_validate({"kind": "compress", "model": MODEL, "input": "inputs.of", **more})


def compress(
    tokenizers: Tokenizers, step: CompressFields, value: Any, query: str = "", **more: Any
) -> Success | Called:
    given = {"on_stop": NEVER, "timeout": timedelta(minutes=2)} | more
    return compress_step.compress(step, value, query, files.read_catalog(), Path(), tokenizers.count, **given)


@pytest.mark.slow
def test_tokens_are_those_of_the_model(tokenizers: Tokenizers, shared: LlamaEngine, model_path: Path) -> None:
    said = ["The lease ends on 2027-03-31.", "", "  two\n\nlines ", "今日は晴れ", "<|im_start|>user", "\ud800"]
    counted = [len(shared.model.tokenize(text, add_special=False, parse_special=False)) for text in said]

    assert tokenizers.count(model_path, said) == counted
    child = tokenizers._child
    assert child is not None
    child.kill()
    child.wait()
    assert tokenizers.count(model_path, said) == counted, "a child that has ended is started again"


@pytest.mark.slow
def test_messages_become_shorter_by_the_count_of_the_model(tokenizers: Tokenizers, model_path: Path) -> None:
    step = fields(target_ratio=3, keep_recent=0)
    found = compress(tokenizers, step, NOTES, "When does the lease of the flat end?")

    assert isinstance(found, Success)
    contents = [message["content"] for message in found.output["messages"]]
    assert NOTES[-1]["content"] in contents
    assert found.output["tokens"]["after"] == sum(tokenizers.count(model_path, contents))
    assert found.output["tokens"]["after"] <= found.output["tokens"]["budget"]
    assert found.output["target_met"] is True
    assert set(compress_step.FIGURES) == set(found.output) - {"messages"}


@pytest.mark.slow
def test_vectors_and_summaries_are_asked_of_a_called_workflow(tokenizers: Tokenizers) -> None:
    step = fields(max_tokens=300, embedding_model="all-minilm:l6-v2", summary={"model": MODEL, "max_tokens": 60})
    first = compress(tokenizers, step, NOTES, "When must they leave?")
    assert isinstance(first, Called)
    check.check(source.SourceDocument(first.definition.document(), {}), Deployment(files.read_catalog()))
    assert [one.kind for one in first.definition.steps] == ["embed", "embed", "compress"]

    vectors = [[1.0, 0.0] if "lease" in text else [0.0, 1.0] for text in first.inputs["passages"]]
    steps = {"query": {"output": [1.0, 0.0]}, "passages": {"output": vectors}}
    second = compress(tokenizers, step, _input_of(first, steps), "When must they leave?")
    assert isinstance(second, Called)
    check.check(source.SourceDocument(second.definition.document(), {}), Deployment(files.read_catalog()))
    assert {one.kind for one in second.definition.steps} == {"generate", "compress"}

    key = second.definition.steps[-2].id
    written = "On day 3 it was cold. Karl Huber paid 99 euros."
    third = compress(tokenizers, step, _input_of(second, {key: {"output": written}}), "When must they leave?")
    assert isinstance(third, Success)
    assert NOTES[-1]["content"] in [message["content"] for message in third.output["messages"]]
    assert third.output["summary"]["sentences_removed"] == 1
    assert third.output["tokens"]["after"] <= 300

    without = compress(tokenizers, step, _input_of(second, {key: {"output": None}}), "When must they leave?")
    assert isinstance(without, Success)
    assert without.output["summary"] is None
    assert "no summary" in without.output["warnings"][0]


def _input_of(called: Called, steps: dict[str, Any]) -> Any:
    last = called.definition.steps[-1]
    assert isinstance(last, CompressFields)
    return conditions.evaluate(last.input, {"inputs": dict(called.inputs), "steps": steps})


@pytest.mark.slow
def test_what_cannot_be_compressed_is_refused(tokenizers: Tokenizers, model_path: Path, tmp_path: Path) -> None:
    step = fields(max_tokens=5)
    with pytest.raises(StepFailure, match="neither a text nor a list") as caught:
        compress(tokenizers, step, 5)
    assert caught.value.reason is FailureReason.INVALID_REQUEST
    with pytest.raises(StepFailure, match="more than half of the target"):
        compress(tokenizers, fields(max_tokens=30, summary={"model": MODEL, "max_tokens": 20}), NOTES)
    with pytest.raises(StepFailure, match="its file is not on this worker's host"):
        compress(tokenizers, fields(max_tokens=5, model="qwen3:4b"), "a text")
    with pytest.raises(StepFailure, match="not compressed within 0 s"):
        compress(tokenizers, step, NOTES, timeout=timedelta(0))
    with pytest.raises(CancelledError):
        compress(tokenizers, step, NOTES, on_stop=lambda stop: stop())
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelFileUnusable, match=r"bad\.gguf"):
        tokenizers.count(tmp_path / "bad.gguf", ["a"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "either 'target_ratio' or 'max_tokens'"),
        ({"target_ratio": 2, "max_tokens": 5}, "either 'target_ratio' or 'max_tokens'"),
        ({"target_ratio": 2, "methods": ["surprisal"]}, "'surprisal' is not offered"),
        ({"target_ratio": 2, "methods": ["llmlingua2"]}, "'llmlingua2' is not available"),
        ({"target_ratio": 2, "protect": {"patterns": ["(?=x)"]}}, "accepted is a pattern for RE2"),
    ],
)
def test_fields_are_checked(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fields(**more)
