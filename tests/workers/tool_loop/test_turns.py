"""Turns of the model of an agent: requests with tools, and calls that a grammar forces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from app.inference.requests import ChatMessage, FinishReason, GenerateRequest, Sampling, ToolCall
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.language.agent import TURN, AgentFields
from app.workflows.state_machine.states import StepState
from workers.engine.simulated import SimulatedEngine
from workers.tool_loop import turns
from workers.tool_loop.record import FORM, LAST, TOOLS, OfferedTool, Opening, Record, RecordedItem

LOOK = OfferedTool("look", "Looks", {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}, 0)


@pytest.fixture
def engine() -> Iterator[SimulatedEngine]:
    made = SimulatedEngine(1, 10_000.0, timedelta(0))
    yield made
    made.close()


def agent(**more: Any) -> AgentFields:
    tool = {"name": "look", "description": "Looks", "http": {"url": "https://a.example"}}
    return AgentFields.model_validate({"kind": "agent", "model": "m", "prompt": "?", "tools": [tool]} | more)


def request(
    step: AgentFields, mode: str = TOOLS, *, forced: bool, said: tuple[ChatMessage, ...] = ()
) -> GenerateRequest:
    opening = Opening([ChatMessage("system", "Be brief."), ChatMessage("user", "?"), *said], [LOOK])
    record = Record([RecordedItem(0, TURN, StepState.RUNNING, {"mode": mode, "opening": opening.document()})])
    return turns.request_of(step, record, mode, forced=forced, sampling=Sampling(), priority="standard", tokens=64)


def test_a_forced_turn_is_a_call_and_the_last_one_an_answer(engine: SimulatedEngine) -> None:
    called = engine.generate(request(agent(), forced=True)).result(10)
    found = turns.written(called, forced=True, schema=None)
    assert found == {"text": "", "tool_calls": [{"name": "look", "arguments": {"n": 0}}], "finish_reason": "tool_calls"}

    last = engine.generate(request(agent(), LAST, forced=True)).result(10)
    found = turns.written(last, forced=True, schema=None)
    assert (found["text"], found["tool_calls"]) == ("[simulated]", [])

    schema = {"type": "object", "required": ["b"], "properties": {"b": {"type": "boolean"}}}
    formed = engine.generate(request(agent(output={"schema": schema}), LAST, forced=True)).result(10)
    assert turns.written(formed, forced=True, schema=schema)["value"] == {"b": True}


def test_a_model_without_tools_reads_calls_and_results_as_text() -> None:
    said = (ChatMessage("assistant", "", (ToolCall("look", {"n": 1}),)), ChatMessage("tool", "seen"))
    system, user, call, result = request(agent(), forced=True, said=said).messages
    assert system.content.startswith("Be brief.")
    assert '"name": "look"' in system.content
    assert user == ChatMessage("user", "?")
    assert call == ChatMessage("assistant", '{"tool": "look", "arguments": {"n": 1}}')
    assert result == ChatMessage("user", "The result of look:\nseen")


def test_a_native_turn_has_the_tools_and_the_form_of_an_answer_a_grammar() -> None:
    schema = {"type": "object"}
    native = request(agent(output={"schema": schema}), forced=False)
    assert [tool.name for tool in native.tools] == ["look"]
    assert native.schema is None
    assert request(agent(), LAST, forced=False).tools == ()
    assert request(agent(output={"schema": schema}), FORM, forced=False).schema == schema


def test_an_answer_that_was_cut_is_kept_and_a_call_is_not(engine: SimulatedEngine) -> None:
    whole = engine.generate(request(agent(), LAST, forced=True)).result(10)
    cut = replace(whole, finish=FinishReason.LENGTH, text='{"answer": "It is \\"so\\" and th')
    found = turns.written(cut, forced=True, schema=None)
    assert (found["text"], found["finish_reason"]) == ('It is "so" and th', "length")
    with pytest.raises(StepFailure) as truncated:
        turns.written(replace(cut, text='{"tool": "look", "argu'), forced=True, schema=None)
    assert truncated.value.reason is FailureReason.TRUNCATED


def test_calls_are_native_only_where_the_model_has_them() -> None:
    assert turns.is_forced(agent(), native=False)
    assert not turns.is_forced(agent(), native=True)
    assert turns.is_forced(agent(calls="forced"), native=True)
    with pytest.raises(StepFailure, match="has no tools"):
        turns.is_forced(agent(calls="native"), native=False)
