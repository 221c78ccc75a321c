"""Each field of generate steps has an effect, seen with a real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.catalog.model import PromptProfile
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from tests.workers.test_finish_reasons import Worker, step
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

pytestmark = pytest.mark.slow

PROMPT = "one, two, three, one, two, three, one, two, three, one, two,"
TOOL = {
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
        },
    }
}
OTHER = {"function": {"name": "set_alarm"}}


@pytest.fixture(scope="module")
def engine(model_path: Path) -> Iterator[LlamaEngine]:
    made = LlamaEngine(
        model_path, EngineOptions(slots=3, context=768, threads=1, profile=PromptProfile(tools="hermes"))
    )
    yield made
    made.close()


@pytest.fixture
def worker(runs: Runs, engine: LlamaEngine, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(runs, engine, tmp_path)
    yield made
    made.close()


def run(worker: Worker, sampling: dict[str, Any] | None = None, **more: Any) -> views.RunView:
    fields = {"chat": False, "prompt": PROMPT, "max_tokens": 8, "sampling": {"temperature": 0, **(sampling or {})}}
    one = {"id": "a", "kind": "generate", "model": "m:1", "retry": {"max_attempts": 1}, **fields, **more}
    return worker.run(json.dumps({"workflow": "w", "steps": [one]}))


def output(worker: Worker, sampling: dict[str, Any] | None = None, **more: Any) -> Any:
    view = run(worker, sampling, **more)
    assert view.run.state == "succeeded", view.steps[0].error
    return view.steps[0].output


def test_n_writes_several_texts(worker: Worker) -> None:
    view = run(worker, {"temperature": 1.2, "seed": 3}, n=3)
    texts = [choice["text"] for choice in view.steps[0].output["choices"]]
    assert len(set(texts)) == 3
    assert 16 < view.steps[0].tokens_out <= 24, "the tokens of all three, of which one may end early"


def test_logprobs_are_those_of_the_text(worker: Worker) -> None:
    found = output(worker, logprobs=True, top_logprobs=2)
    assert "".join(one["token"] for one in found["logprobs"]) == found["text"]
    assert {len(one["top_logprobs"]) for one in found["logprobs"]} == {2}
    assert output(worker) == found["text"]


def test_tools_are_called(worker: Worker) -> None:
    asked = {"chat": True, "prompt": "Weather in Cusco?", "tools": [TOOL, OTHER], "max_tokens": 80}
    view = run(worker, **asked, tool_choice={"function": {"name": "get_weather"}})
    (call,) = view.steps[0].output["tool_calls"]
    assert call["name"] == "get_weather"
    assert isinstance(call["arguments"]["city"], str)
    assert step(view, "a").finish_reason == view.steps[0].output["finish_reason"] == "tool_calls"
    assert len(output(worker, **asked, tool_choice="required", parallel_tool_calls=False)["tool_calls"]) == 1
    assert output(worker, **asked, tool_choice="none")["tool_calls"] == []


def test_a_grammar_forms_the_text(worker: Worker) -> None:
    assert output(worker, grammar='root ::= "left" | "right"') in ("left", "right")


def test_a_prefill_is_continued(worker: Worker) -> None:
    asked = {"chat": True, "prompt": "Name a colour.", "max_tokens": 6}
    plain, begun = run(worker, **asked), run(worker, **asked, prefill="The colour of grass is")
    assert begun.steps[0].tokens_in > plain.steps[0].tokens_in
    assert begun.steps[0].output != plain.steps[0].output


def test_truncation_leaves_out_the_oldest_messages(worker: Worker) -> None:
    messages = [{"role": "user", "content": f"{number}: " + "some words " * 30} for number in range(20)]
    asked = {"chat": True, "prompt": None, "messages": messages}
    assert run(worker, **asked).steps[0].error["reason"] == "context_exceeded"
    assert output(worker, **asked, truncation="auto")


def test_without_max_tokens_the_context_is_the_limit(worker: Worker) -> None:
    view = run(worker, {"ignore_end": True}, max_tokens=None)
    assert view.steps[0].tokens_in + view.steps[0].tokens_out == 256, "the share of a slot"
    assert view.steps[0].finish_reason == "length"


def test_stop_ends_the_text(worker: Worker) -> None:
    assert "three" in output(worker)
    assert "three" not in output(worker, stop=["three"])


def test_ignore_end_continues_after_the_end(worker: Worker) -> None:
    asked = {"chat": True, "prompt": "Say yes.", "max_tokens": 150}
    assert run(worker, **asked).steps[0].finish_reason == "stop"
    assert run(worker, {"ignore_end": True}, **asked).steps[0].tokens_out == 150


def test_a_logit_bias_forbids_a_token(worker: Worker, engine: LlamaEngine) -> None:
    (token,) = engine.model.tokenize(" three", add_special=False, parse_special=False)
    assert "three" not in output(worker, {"logit_bias": {str(token): -100}})


def test_penalties_apply_to_the_last_tokens(worker: Worker) -> None:
    base = output(worker)
    assert output(worker, {"repeat_penalty": 2.0}) != base
    assert output(worker, {"repeat_penalty": 2.0, "penalty_last_n": 0}) == base


def test_frequency_and_presence_penalties(worker: Worker) -> None:
    base = output(worker)
    assert output(worker, {"frequency_penalty": 2.0}) != base
    assert output(worker, {"presence_penalty": 2.0}) != base


def test_dry_penalises_repetitions(worker: Worker) -> None:
    base, dry = output(worker), {"dry_multiplier": 5.0, "dry_base": 3.0}
    assert output(worker, dry) != base
    assert output(worker, {**dry, "dry_allowed_length": 1000}) == base
    assert output(worker, {**dry, "dry_last_n": 0}) == base
    assert output(worker, {**dry, "dry_breakers": [" one", " two", " three"]}) == base
    assert output(worker, {"dry_multiplier": 0.001, "dry_base": 1.0}) == base


def test_the_choice_of_tokens(worker: Worker) -> None:
    free = {"temperature": 1.5, "seed": 11, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    base, greedy = output(worker, free), output(worker)
    assert base != greedy
    assert output(worker, free) == base, "the seed decides"
    assert output(worker, {**free, "seed": 12}) != base
    for narrow in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"typical_p": 0.001}):
        assert output(worker, {**free, **narrow}) != base, narrow
    assert output(worker, {**free, "mirostat": True, "mirostat_tau": 0.1, "mirostat_eta": 0.9}) != base


def test_map_bodies_have_the_same_fields(worker: Worker) -> None:
    inner = {
        "kind": "generate",
        "model": "m:1",
        "chat": False,
        "prompt": "{{ item }}",
        "n": 2,
        "max_tokens": 4,
        "grammar": 'root ::= "x"',
    }
    one = {"id": "a", "kind": "map", "over": '["a", "b"]', "step": inner}
    view = worker.run(json.dumps({"workflow": "w", "steps": [one]}))
    choices = [{"text": "x", "finish_reason": "stop"}] * 2
    assert view.run.output == {"a": [{"choices": choices}, {"choices": choices}]}
