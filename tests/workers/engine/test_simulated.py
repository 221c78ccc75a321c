"""The simulated engine implements the engine protocol and marks its texts."""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError
from datetime import timedelta
from typing import Any

import pytest

from app.inference import answers
from app.inference.requests import EmbedRequest, FinishReason, GenerateRequest, PriorityClass
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import Engine
from workers.engine.simulated import SimulatedEngine
from workers.engine.simulated_texts import MARK

FAST, SLOW = 100_000.0, 0.001


def engine(slots: int = 2, pace: float = FAST) -> SimulatedEngine:
    return SimulatedEngine(slots, pace, timedelta(0))


def test_it_implements_the_protocol_and_marks_its_texts() -> None:
    progress: list[float] = []
    made: Engine = SimulatedEngine(2, FAST, timedelta(0), progress.append)
    pieces: list[str] = []
    written = made.generate(GenerateRequest(prompt="Hello", max_tokens=9), pieces.append).result(10)

    assert progress[-1] == 1.0
    assert written.text.startswith(MARK)
    assert "".join(pieces) == written.text
    assert (written.tokens_out, written.finish) == (9, FinishReason.STOP)
    made.close()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "required": ["a", "b"], "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "integer"}}},
        {"type": "array", "minItems": 2, "items": {"type": "string", "minLength": 20}},
        {"anyOf": [{"const": 3}, {"type": "null"}]},
        {"type": "number", "minimum": 2.5},
    ],
)
def test_texts_conform_to_the_schema(schema: dict[str, Any]) -> None:
    made = engine()
    text = made.generate(GenerateRequest(prompt="x", schema=schema, max_tokens=256)).result(10).text
    answers.require(text, schema)
    json.loads(text)
    made.close()


def test_an_unsupported_schema_is_a_failure() -> None:
    made = engine()
    schema = {"type": "string", "pattern": "^[0-9]{4}$"}
    with pytest.raises(StepFailure) as failed:
        made.generate(GenerateRequest(prompt="x", schema=schema)).result(10)
    assert failed.value.reason is FailureReason.INVALID_OUTPUT
    made.close()


def test_a_cancel_frees_the_slot_and_interactive_requests_go_first() -> None:
    made = engine(slots=1, pace=SLOW)
    first = made.generate(GenerateRequest(prompt="x"))
    later = made.generate(GenerateRequest(prompt="x", priority=PriorityClass.BATCH))
    urgent = made.generate(GenerateRequest(prompt="x", priority=PriorityClass.INTERACTIVE))
    order: list[str] = []
    done = threading.Event()
    urgent.future.add_done_callback(lambda _: (order.append("urgent"), later.cancel()))
    later.future.add_done_callback(lambda _: (order.append("later"), done.set()))
    urgent.cancel()
    first.cancel()

    assert done.wait(10)
    assert order == ["urgent", "later"]
    with pytest.raises(CancelledError):
        first.result(10)
    made.close()


def test_closing_fails_running_and_waiting_requests() -> None:
    made = engine(slots=1, pace=SLOW)
    tickets = [made.generate(GenerateRequest(prompt="x")) for _ in range(2)]
    tickets[0].cancel()
    made.close()
    with pytest.raises(StepFailure) as failed:
        made.generate(GenerateRequest(prompt="x"))
    assert failed.value.reason is FailureReason.WORKER_STOPPED
    assert tickets[1].future.exception(10) is not None


def test_vectors_have_length_one_and_depend_only_on_the_text() -> None:
    made = engine()
    one, two, again = made.embed(EmbedRequest(("a", "b", "a"), dimensions=16)).vectors
    assert one == again != two
    assert sum(number**2 for number in one) == pytest.approx(1)
    assert len(one) == 16
    made.close()


def test_a_reader_that_fails_costs_its_request_and_no_slot() -> None:
    """What is raised on the engine's thread ends the request with a reason; the slot serves the next one."""
    made = engine(slots=1)

    def broken(_: str) -> None:
        raise RuntimeError("nobody reads")

    with pytest.raises(StepFailure, match="RuntimeError: nobody reads") as failed:
        made.generate(GenerateRequest(prompt="x", max_tokens=9), broken).result(10)
    assert failed.value.reason is FailureReason.INTERNAL
    assert made.generate(GenerateRequest(prompt="x", max_tokens=9)).result(10).tokens_out == 9
    made.close()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 10**12},
        {"type": "array", "minItems": 10**12},
        {"type": "array", "minItems": 900, "items": {"type": "array", "minItems": 900, "items": {"type": "array"}}},
        {
            "type": "object",
            "required": [f"k{n}" for n in range(50)],
            "properties": {f"k{n}": {"type": "string", "minLength": 900} for n in range(50)},
        },
    ],
)
def test_a_schema_that_asks_for_more_than_max_tokens_fails_before_it_is_filled(schema: dict[str, Any]) -> None:
    made = engine()
    with pytest.raises(StepFailure, match="longer than max_tokens") as failed:
        made.generate(GenerateRequest(prompt="x", schema=schema, max_tokens=256))
    assert failed.value.reason is FailureReason.INVALID_OUTPUT
    made.close()
