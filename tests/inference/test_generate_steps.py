"""The fields of generate steps reach the engine, and its results become their outputs."""

from __future__ import annotations

from dataclasses import fields
from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from app.inference import prompts, step_outputs
from app.inference.recommended import RECOMMENDABLE
from app.inference.requests import (
    ChatMessage,
    FinishReason,
    Generated,
    GenerateRequest,
    NamedTool,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCall,
)
from app.kernel.errors import InvalidDefinition, StepFailure
from app.workflows.language import check
from app.workflows.language.generate_fields import GenerateFields, SamplingFields

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"function": {"name": "weather", "description": "d", "parameters": CITY}}]


def step(**more: Any) -> GenerateFields:
    return GenerateFields.model_validate({"kind": "generate", "model": "m:1", "prompt": "x", **more})


def request(data: dict[str, Any] | None = None, attempt: int = 1, **more: Any) -> GenerateRequest:
    return prompts.request_of(step(**more), data or {}, priority="standard", attempt=attempt)


def text(written: str = "hello", **more: Any) -> Generated:
    given = {"finish": FinishReason.STOP, "tokens_in": 1, "tokens_out": 2, "tokens_cached": 0}
    return Generated(**{"text": written, "time_to_first": timedelta(0), "time_total": timedelta(0), **given, **more})


def test_every_sampling_parameter_of_the_engine_can_be_set() -> None:
    assert {one.name for one in fields(Sampling)} - {"unset"} == set(SamplingFields.model_fields)


def test_every_field_of_a_request_can_be_set() -> None:
    """Those that a step does not have: what its class, its deadline and its failures are is said elsewhere."""
    others = {"priority", "deadline", "keeps_cut", "fits_context", "truncates", "schema", "parallel_calls"}
    own = {"output", "parallel_tool_calls", "truncation", "max_tokens"}
    known = set(GenerateFields.model_fields)
    assert {one.name for one in fields(GenerateRequest)} - others <= known
    assert own <= known


def test_the_fields_reach_the_engine() -> None:
    made = request(
        n=3,
        logprobs=True,
        top_logprobs=2,
        tools=TOOLS,
        tool_choice={"function": {"name": "weather"}},
        parallel_tool_calls=False,
        prefill="So, {{ inputs.name }}",
        truncation="auto",
        max_tokens=None,
        reasoning_effort="none",
        template_arguments={"enable_thinking": False},
        sampling={"logit_bias": {"5": -100, "6": 2}, "mirostat": True, "dry_breakers": ["x"], "penalty_last_n": -1},
        data={"inputs": {"name": "Ann"}},
    )
    assert (made.n, made.logprobs) == (3, 2)
    assert made.tools == (Tool("weather", "d", CITY),)
    assert (made.tool_choice, made.parallel_calls) == (NamedTool("weather"), False)
    assert made.prefill == "So, Ann"
    assert (made.truncates, made.fits_context) == (True, True)
    assert made.sampling == Sampling(
        logit_bias={5: float("-inf"), 6: 2.0},
        mirostat=True,
        dry_breakers=("x",),
        penalty_last_n=-1,
        unset=RECOMMENDABLE,
    )
    assert (made.reasoning_effort, made.template_arguments) == ("none", {"enable_thinking": False})
    assert request(sampling={"temperature": 0.1}).sampling.unset == RECOMMENDABLE - {"temperature"}
    assert request(grammar='root ::= ("a")').grammar == 'root ::= "a"\n'
    assert (request().logprobs, request(logprobs=True).logprobs) == (None, 0)


def test_each_attempt_has_seeds_of_its_own() -> None:
    seeds = [request(n=3, sampling={"seed": 7}, attempt=attempt).sampling.seed for attempt in (1, 2)]
    assert seeds == [7, 10], "the texts of the first attempt have 7, 8 and 9"


def test_calls_and_their_results_continue_a_conversation() -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": "steps.ask.output.tool_calls"},
        {"role": "tool", "content": "4 degrees"},
    ]
    calls = [{"name": "weather", "arguments": {"city": "Cusco"}}]
    made = request({"steps": {"ask": {"output": {"tool_calls": calls}}}}, prompt=None, messages=messages, tools=TOOLS)
    assert made.messages == (
        ChatMessage("user", "Weather?"),
        ChatMessage("assistant", "", (ToolCall("weather", {"city": "Cusco"}),)),
        ChatMessage("tool", "4 degrees"),
    )
    with pytest.raises(StepFailure, match="no tool call"):
        request({"steps": {"ask": {"output": {"tool_calls": ["x"]}}}}, prompt=None, messages=messages, tools=TOOLS)


def test_the_output_is_a_text_unless_the_step_asks_for_more() -> None:
    assert step_outputs.output_of(step(), text()) == "hello"
    assert step_outputs.output_of(step(output={"schema": {}}), text('{"a": 1}')) == {"a": 1}
    several = step_outputs.output_of(step(n=2), text(alternatives=(text("two", finish=FinishReason.LENGTH),)))
    assert several == {
        "choices": [{"text": "hello", "finish_reason": "stop"}, {"text": "two", "finish_reason": "length"}]
    }
    call = ToolCall("weather", {"city": "Cusco"})
    assert step_outputs.output_of(step(tools=TOOLS), text("", tool_calls=(call,))) == {
        "text": "",
        "finish_reason": "tool_calls",
        "tool_calls": [{"name": "weather", "arguments": {"city": "Cusco"}}],
    }
    found = step_outputs.output_of(step(logprobs=True), text(logprobs=(TokenLogprob(1, b"hello", -0.5),)))
    assert found["logprobs"] == [{"token": "hello", "logprob": -0.5, "bytes": list(b"hello"), "top_logprobs": []}]
    schemas = step(n=2, output={"schema": {}})
    assert step_outputs.output_of(schemas, text("1", alternatives=(text("2"),)))["choices"][1]["value"] == 2


INVALID = {
    "too many texts": ({"n": 17}, "n"),
    "two forms": ({"grammar": 'root ::= "a"', "tools": TOOLS}, "at most one is accepted"),
    "log-probabilities of nothing": ({"top_logprobs": 2}, "'logprobs: true'"),
    "a choice without tools": ({"tool_choice": "required"}, "no 'tools'"),
    "an unknown tool": ({"tools": TOOLS, "tool_choice": {"function": {"name": "f"}}}, "the tools are weather"),
    "two tools of one name": ({"tools": TOOLS * 2}, "unique"),
    "tools without a template": ({"tools": TOOLS, "chat": False}, "need the chat template"),
    "a token that is none": ({"sampling": {"logit_bias": {"x": 1}}}, "logit_bias"),
    "a calling user": ({"prompt": None, "messages": [{"role": "user", "tool_calls": "x"}]}, "role assistant"),
    "an empty message": ({"prompt": None, "messages": [{"role": "user"}]}, "no 'content'"),
}


@pytest.mark.parametrize(("more", "message"), INVALID.values(), ids=INVALID)
def test_what_does_not_fit_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        step(**more)
    assert message in str(caught.value)


REFUSED = {
    "a grammar": ('grammar: "root ::= root"', "steps[0].grammar", "begin with themselves"),
    "a schema of a tool": (
        "tools: [{function: {name: f, parameters: {type: nothing}}}]",
        "steps[0].tools[0].function.parameters",
        "nothing",
    ),
    "a mode": ("tool_choice: sometimes", "steps[0].tool_choice", "sometimes"),
    "an unknown field of a tool": ("tools: [{function: {nam: f}}]", "steps[0].tools[0].function", "missing"),
    "an expression": (
        "messages: [{role: assistant, tool_calls: steps.nothing.output}]",
        "steps[0].messages[0].tool_calls",
        "nothing",
    ),
    "a template": ('prefill: "{{ inputs.nothing }}"', "steps[0].prefill", "nothing"),
}


@pytest.mark.parametrize(("field", "where", "message"), REFUSED.values(), ids=REFUSED)
def test_a_submission_names_the_field(field: str, where: str, message: str) -> None:
    prompt = "" if "messages" in field else "    prompt: x\n"
    head = 'workflow: w\nsteps:\n  - id: a\n    kind: generate\n    model: "m:1"\n'
    with pytest.raises(InvalidDefinition) as caught:
        check.parse(f"{head}{prompt}    {field}\n")
    assert any(problem.where.startswith(where) and message in str(problem) for problem in caught.value.problems), (
        caught.value
    )
