"""Thinking: it is split from the answer wherever pieces end, and grammars, calls and stops concern the answer alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalog.model import PromptProfile
from app.catalog.profiles.family import ThinkingTags
from app.inference.requests import (
    ChatMessage,
    FinishReason,
    Generated,
    GenerateRequest,
    Sampling,
    TextPiece,
    Tool,
)
from app.kernel.errors import StepFailure
from tests.workers.engine.chat.script import written
from workers.engine.chat.thinking import ThinkingSplitter
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

#: A template with a switch, in the form of Qwen 3's.
SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% if false %}<tool_call>{{ tools }}{% endif %}"
)
#: One that always opens the thinking, as those of DeepSeek's distils do.
OPENED = SWITCHED.replace("{% if enable", "<think>\n{% if false and enable")
CITY = Tool("get_weather", "", {"type": "object", "properties": {"city": {"enum": ["Cusco"]}}, "required": ["city"]})
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Cusco"}}\n</tool_call>'
YES = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}


def split(parts: list[str], *, opened: bool = False) -> tuple[str, str]:
    splitter = ThinkingSplitter(ThinkingTags(), opened, not opened)
    found = [splitter.feed(part) for part in parts] + [splitter.finish()]
    return "".join(one for one, _ in found), "".join(other for _, other in found)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("<think>\nIt is so.\n</think>\n\nYes.", False, "It is so.", "Yes."),
        ("\n<think></think>Yes.", False, "", "Yes."),
        ("It is so.\n</think>\n\nYes.", True, "It is so.", "Yes."),
        ("<think>a <think> b</think>c</think>d", False, "a <think> b", "c</think>d"),
        ("<think>\nnever ends </thin", False, "never ends </thin", ""),
        ("never ends", True, "never ends", ""),
        ("Yes. <think>no</think>", False, "", "Yes. <think>no</think>"),
        ("<thin ice>", False, "", "<thin ice>"),
        ("  text", False, "", "  text"),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
        ("<think>a\n\n\nb</think>\n", False, "a\n\n\nb", ""),
    ],
)
def test_thinking_is_split_wherever_the_pieces_end(text: str, opened: bool, reasoning: str, answer: str) -> None:
    assert split([text], opened=opened) == (reasoning, answer)
    assert split(list(text), opened=opened) == (reasoning, answer)
    for at in range(len(text) + 1):
        assert split([text[:at], text[at:]], opened=opened) == (reasoning, answer), at


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "ink>", " ", "\n", "a", "b" * 70, " " * 90])))
def test_pieces_never_change_what_is_thought(parts: list[str]) -> None:
    """And nothing but tags and whitespace is lost."""
    whole, piecewise = split(["".join(parts)]), split(parts)
    assert [one.split() for one in whole] == [one.split() for one in piecewise]
    letters = [character for character in "".join(parts).replace("think>", "") if character in "ab"]
    assert [character for one in whole for character in one.replace("think>", "") if character in "ab"] == letters


@pytest.fixture(scope="module")
def hybrid(tiny_llama: Path) -> Iterator[LlamaEngine]:
    yield from engine(tiny_llama, SWITCHED)


@pytest.fixture(scope="module")
def opened(tiny_llama: Path) -> Iterator[LlamaEngine]:
    yield from engine(tiny_llama, OPENED)


def engine(path: Path, template: str, **profile: Any) -> Iterator[LlamaEngine]:
    prompt = PromptProfile(chat_template=template, **({"profile": "thinking"} | profile))
    made = LlamaEngine(path, EngineOptions(slots=2, context=4096, threads=1, profile=prompt))
    yield made
    made.close()


def ask(**more: Any) -> GenerateRequest:
    given_ = {"messages": (ChatMessage("user", "Really?"),), "max_tokens": 60, "sampling": Sampling(temperature=0)}
    return GenerateRequest(**(given_ | more))


def run(model: LlamaEngine, text: str, *, ends: bool = True, **more: Any) -> tuple[Generated, list[TextPiece]]:
    pieces: list[TextPiece] = []
    with written(model, text, ends=ends):
        return model.generate(ask(**more), on_piece=pieces.append).result(100), pieces


def test_the_answer_and_the_thinking_are_separate_also_in_a_stream(hybrid: LlamaEngine) -> None:
    found, pieces = run(hybrid, "<think>\nIt is so, I think.\n</think>\n\nYes it is.")
    assert (found.text, found.reasoning) == ("Yes it is.", "It is so, I think.")
    assert "".join(piece.text for piece in pieces) == found.text
    assert "".join(piece.reasoning for piece in pieces) == found.reasoning
    assert sum(bool(piece.reasoning) for piece in pieces) > 3, "piece by piece"
    assert 0 < found.reasoning_tokens < found.tokens_out


def test_log_probabilities_are_those_of_the_answer(hybrid: LlamaEngine) -> None:
    found, pieces = run(hybrid, "<think>\nso\n</think>\n\nYes it is.", logprobs=0)
    assert len(found.logprobs) == found.tokens_out - found.reasoning_tokens
    assert b"".join(one.piece for one in found.logprobs).decode().strip() == found.text
    assert [one for piece in pieces for one in piece.logprobs] == list(found.logprobs)


def test_thinking_that_is_cut_is_no_answer(hybrid: LlamaEngine) -> None:
    found, _ = run(hybrid, "<think>\nIt is so, I think, and so on and on", max_tokens=6, ends=False)
    assert (found.text, found.finish, found.reasoning_tokens) == ("", FinishReason.LENGTH, 6)
    assert found.reasoning.startswith("It")


def test_stop_texts_do_not_end_the_thinking(opened: LlamaEngine) -> None:
    found, _ = run(opened, "One. Two.\n</think>\n\nOne. Two.", stop=(" Two",))
    assert (found.reasoning, found.text) == ("One. Two.", "One.")


def test_a_prompt_without_a_template_has_no_thinking(opened: LlamaEngine) -> None:
    found, _ = run(opened, "a</think>b", messages=(), prompt="Once")
    assert (found.text, found.reasoning) == ("a</think>b", "")


@pytest.mark.parametrize("model", ["hybrid", "opened"])
def test_a_grammar_applies_after_the_thinking(model: str, request: pytest.FixtureRequest) -> None:
    """The text after it is not JSON, so the grammar chooses."""
    found, _ = run(request.getfixturevalue(model), "Hm {no}.\n</think>\n\nWell", schema=YES, ends=False)
    assert found.reasoning == "Hm {no}."
    assert set(json.loads(found.text)) == {"yes"}


def test_a_text_with_a_grammar_does_not_end_before_its_answer(opened: LlamaEngine) -> None:
    found, _ = run(opened, "Hm", schema=YES, ends=True, keeps_cut=True, max_tokens=30)
    assert found.finish is FinishReason.LENGTH
    with pytest.raises(StepFailure, match="before its JSON was complete"):
        run(opened, "Hm", schema=YES, ends=True, max_tokens=30)


def test_thinking_can_be_switched_off(hybrid: LlamaEngine) -> None:
    for more in ({"template_arguments": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        prompt = hybrid._template.prompt(ask(**more))
        assert prompt.is_unthinking
        text = b"".join(hybrid.model.piece(token, special=True) for token in prompt.tokens).decode()
        assert text.endswith("<think>\n\n</think>\n\n")
        found, _ = run(hybrid, '{"yes": true}', schema=YES, **more)
        assert (found.text, found.reasoning) == ('{"yes": true}', "")
    assert not hybrid._template.prompt(ask(reasoning_effort="high")).is_unthinking


def test_earlier_thinking_is_not_sent_back(hybrid: LlamaEngine) -> None:
    turns = (ChatMessage("assistant", "<think>\nold\n</think>\n\nYes."), ChatMessage("user", "Why?"))
    tokens = hybrid._template.prompt(ask(messages=turns)).tokens
    assert b"old" not in b"".join(hybrid.model.piece(token, special=True) for token in tokens)


def test_a_call_inside_the_thinking_is_none(hybrid: LlamaEngine) -> None:
    found, pieces = run(hybrid, f"<think>\nShould I {CALL}?\n</think>\n\nNo.", tools=(CITY,), max_tokens=200)
    assert (found.tool_calls, found.text) == ((), "No.")
    assert CALL in found.reasoning
    assert not any(piece.calls for piece in pieces)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_may_follow_the_thinking(hybrid: LlamaEngine, choice: Any) -> None:
    begun = "<think>\n" if choice == "auto" else ""
    text = f"{begun}It rains.\n</think>\n\n{CALL}"
    found, pieces = run(hybrid, text, tools=(CITY,), tool_choice=choice, parallel_calls=False, max_tokens=200)
    assert (found.reasoning, found.text) == ("It rains.", "")
    assert [dict(call.arguments) for call in found.tool_calls] == [{"city": "Cusco"}]
    assert "".join(part.arguments for piece in pieces for part in piece.calls) == found.tool_calls[0].written


def test_a_prefill_is_the_beginning_of_the_answer(opened: LlamaEngine) -> None:
    tokens = opened._template.prompt(ask(prefill="Yes, ")).tokens
    text = b"".join(opened.model.piece(token, special=True) for token in tokens).decode()
    assert text.endswith("<think>\n</think>\n\nYes, ")
    found, _ = run(opened, "indeed.", prefill="Yes, ")
    assert (found.text, found.reasoning) == ("indeed.", "")


def test_variables_of_a_request_cannot_inject_control_tokens(hybrid: LlamaEngine) -> None:
    template = type(hybrid._template)(hybrid.model, PromptProfile(chat_template="{{ who }}", profile="none"))
    tokens = template.prompt(ask(template_arguments={"who": "<|im_start|>"})).tokens
    assert not set(tokens) & set(hybrid.model.control_tokens)


def test_recommended_sampling_fills_what_the_request_leaves_open(tiny_llama: Path) -> None:
    """With `top_k = 1` a text is the likeliest one, unless the request says otherwise."""
    prompt = PromptProfile(chat_template="chatml", sampling={"top_k": 1, "temperature": 5.0})
    made = LlamaEngine(tiny_llama, EngineOptions(slots=1, context=512, threads=1, profile=prompt))
    free = frozenset({"temperature", "top_k"})
    greedy = made.generate(ask(max_tokens=12)).result(100).text
    likely = [made.generate(ask(max_tokens=12, sampling=Sampling(unset=free, seed=s))).result(100).text for s in (1, 2)]
    assert likely == [greedy, greedy]
    chosen = Sampling(top_k=0, top_p=1.0, min_p=0.0, unset=free - {"top_k"}, seed=1)
    assert made.generate(ask(max_tokens=12, sampling=chosen)).result(100).text != greedy
    made.close()
