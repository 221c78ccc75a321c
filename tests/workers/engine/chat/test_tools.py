"""Tools: free text is unconstrained, calls are constrained from their beginning, readers never see a part of a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from app.catalog.model import PromptProfile
from app.catalog.profiles.family import ToolCallStyle
from app.inference.requests import (
    ChatMessage,
    Generated,
    GenerateRequest,
    NamedTool,
    Sampling,
    TextPiece,
    Tool,
    ToolCall,
)
from app.kernel.errors import FailureReason, StepFailure
from tests.workers.engine.chat.script import written
from workers.engine.bindings import native
from workers.engine.chat import tools
from workers.engine.chat.call_forms import FORMS, render
from workers.engine.chat.calls import ToolCallDetector
from workers.engine.chat.lazy_grammar import LazyGrammar
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions
from workers.engine.sampling.sampler import TokenCandidates

MakeEngine = Callable[..., LlamaEngine]

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
HOUR = {"type": "object", "properties": {"hour": {"enum": [6, 7, 8]}}, "required": ["hour"]}
WEATHER, ALARM = Tool("get_weather", "The weather of a city", CITY), Tool("set_alarm", "Rings", HOUR)
QUESTION = ChatMessage("user", "What is the weather in Cusco?")
OPENING = FORMS["hermes"].opening
STYLES: list[ToolCallStyle] = ["hermes", "llama3"]


@pytest.fixture(scope="module")
def real(model_path: Path) -> Iterator[dict[ToolCallStyle, LlamaEngine]]:
    """SmolLM2 with each style of tool calls."""
    made = {style: LlamaEngine(model_path, options(style)) for style in STYLES}
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Iterator[LlamaEngine]:
    """Random weights: the text is random except for the grammar."""
    engine = LlamaEngine(tiny_llama, options("hermes"))
    yield engine
    engine.close()


def options(style: ToolCallStyle) -> EngineOptions:
    return EngineOptions(slots=2, context=4096, threads=1, profile=PromptProfile(tools=style))


def ask(**more: Any) -> GenerateRequest:
    given = {"messages": (QUESTION,), "max_tokens": 90, "tools": (WEATHER, ALARM), "sampling": Sampling(temperature=0)}
    return GenerateRequest(**(given | more))


def run(engine: LlamaEngine, request: GenerateRequest) -> tuple[Generated, str]:
    """Return the result and the text that its reader received."""
    pieces: list[str] = []
    result = engine.generate(request, pieces.append).result(100)
    return result, "".join(pieces)


@pytest.mark.parametrize("style", STYLES)
def test_the_pieces_of_a_call_are_its_arguments(real: dict[ToolCallStyle, LlamaEngine], style: ToolCallStyle) -> None:
    found: list[TextPiece] = []
    result = real[style].generate(ask(tool_choice=NamedTool("get_weather")), on_piece=found.append).result(100)
    (call,) = result.tool_calls
    parts = [part for piece in found for part in piece.calls]
    assert (parts[0].name, parts[0].place) == ("get_weather", 0)
    assert "".join(part.arguments for part in parts) == call.written
    assert json.loads(call.written) == call.arguments
    assert len(parts) > 2


def biased_to(engine: LlamaEngine, text: str, temperature: float = 0) -> Sampling:
    """Return sampling with a bias to the tokens of `text`."""
    bias = dict.fromkeys(engine.model.tokenize(text, add_special=False, parse_special=False), 14.0)
    return Sampling(temperature=temperature, seed=5, logit_bias=bias)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("choice", ["required", NamedTool("set_alarm")])
def test_a_required_call_is_made(real: dict[ToolCallStyle, LlamaEngine], style: ToolCallStyle, choice: Any) -> None:
    result, shown = run(real[style], ask(tool_choice=choice, parallel_calls=False))
    (call,) = result.tool_calls
    assert (result.text, shown) == ("", "")
    if choice == "required":
        assert call.name in ("get_weather", "set_alarm")
    else:
        assert (call.name, call.arguments["hour"] in (6, 7, 8)) == ("set_alarm", True)


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_call_that_the_model_begins_is_constrained(
    real: dict[ToolCallStyle, LlamaEngine], temperature: float
) -> None:
    """A bias makes the opening likely; the grammar does the rest."""
    for style, opening in (("hermes", OPENING), ("llama3", '{"name":')):
        engine = real[style]
        request = ask(sampling=biased_to(engine, opening, temperature), max_tokens=150, parallel_calls=False)
        result, shown = run(engine, request)
        assert len(result.tool_calls) == 1
        assert shown == result.text
        assert opening not in shown


@pytest.mark.parametrize("style", get_args(ToolCallStyle))
def test_calls_of_each_style_are_forced_and_streamed(make: MakeEngine, tiny_llama: Path, style: ToolCallStyle) -> None:
    """Random weights write them, from the beginning or from the marker on."""
    engine = make(tiny_llama, slots=1, context=4096, profile=PromptProfile(tools=style))
    request = ask(tools=(ALARM, WEATHER), tool_choice=NamedTool("set_alarm"))
    begun = render([ToolCall("set_alarm", {"hour": 6})], style).partition("set_alarm")[0]
    for text, more in (("", {}), (begun, {"tool_choice": "auto", "parallel_calls": False, "tools": (ALARM,)})):
        found: list[TextPiece] = []
        with written(engine, text):
            result = engine.generate(replace(request, max_tokens=200, **more), on_piece=found.append).result(100)
        (call,) = result.tool_calls
        assert (call.name, call.arguments["hour"] in (6, 7, 8), result.text) == ("set_alarm", True, "")
        parts = [part for piece in found for part in piece.calls]
        assert [part.name for part in parts if part.name] == ["set_alarm"]
        assert "".join(part.arguments for part in parts) == call.written
        assert not any(piece.text for piece in found)


def test_several_calls_of_the_style_coder_have_typed_arguments(make: MakeEngine, tiny_llama: Path) -> None:
    engine = make(tiny_llama, slots=1, context=4096, profile=PromptProfile(tools="coder"))
    size = {"type": "object", "properties": {"unit": {"enum": ["m", "km"]}, "n": {"$ref": "#/$defs/n"}},
            "required": ["unit", "n"], "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 3}}}  # fmt: skip
    endless = Sampling(temperature=0, logit_bias=dict.fromkeys(engine.model.end_tokens, -1000000000.0))
    request = ask(tools=(Tool("size", "", size),), tool_choice="required", max_tokens=2_000, sampling=endless)
    result = engine.generate(request).result(100)
    assert len(result.tool_calls) == tools.MAX_CALLS
    for call in result.tool_calls:
        assert call.arguments["unit"] in ("m", "km")
        assert call.arguments["n"] in (1, 2, 3)


def test_what_is_no_proper_call_stays_text_for_those_who_take_it(make: MakeEngine, tiny_llama: Path) -> None:
    """In the style `coder` a grammar does not bound texts; the schema does."""
    engine = make(tiny_llama, slots=1, context=4096, profile=PromptProfile(tools="coder"))
    short = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 2}}, "required": ["a"]}
    text = render([ToolCall("f", {"a": "far too long"})], "coder")
    request = ask(tools=(Tool("f", "", short),), max_tokens=100, parallel_calls=False)
    with written(engine, f"Well. {text}", ends=True):
        kept = engine.generate(replace(request, keeps_cut=True)).result(100)
    assert (kept.text, kept.tool_calls) == (f"Well. {text}", ())
    with written(engine, text, ends=True), pytest.raises(StepFailure) as caught:
        engine.generate(request).result(100)
    assert (caught.value.reason, caught.value.text) == (FailureReason.INVALID_OUTPUT, text)


def test_a_text_without_calls_is_unconstrained(tiny: LlamaEngine) -> None:
    result, shown = run(tiny, ask(max_tokens=40, sampling=Sampling(temperature=1.5, seed=3, ignore_end=True)))
    assert (result.text, result.tool_calls, result.tokens_out) == (shown, (), 40)


def test_a_call_may_follow_text(tiny: LlamaEngine) -> None:
    with written(tiny, f"Hello there{OPENING}"):
        result, shown = run(tiny, ask(max_tokens=200, parallel_calls=False))
    assert shown == result.text == "Hello there"
    assert result.tool_calls


def test_a_token_that_continues_an_opening_wrongly_is_rejected(tiny: LlamaEngine) -> None:
    """`></` is one token; llama.cpp's own lazy grammar aborts the process on it."""
    candidates, model = TokenCandidates(tiny.model.n_vocab), tiny.model
    tiny._loop.byte_index.prepare()
    compiled = tools.compile_tools(tiny._grammars, ask(), "hermes")
    lazy = LazyGrammar(model, tiny._loop.byte_index, compiled, ToolCallDetector("hermes"))

    def token(text: str) -> int:
        (found,) = model.tokenize(text, add_special=False, parse_special=False)
        return found

    for before in model.tokenize("Sure: </b> <tool_call", add_special=False, parse_special=False):
        assert lazy.accept(before, candidates.allows) == (True, None)
    assert lazy.accept(token("></"), candidates.allows) == (False, None)
    allowed, grammar = lazy.accept(token(">"), candidates.allows)
    try:
        assert allowed
        assert candidates.allows(grammar, token("\n"))
        assert candidates.allows(grammar, token("{"))
        assert not candidates.allows(grammar, token(" the"))
    finally:
        native.free_sampler(grammar)


def test_several_calls_in_one_text_are_limited(tiny: LlamaEngine) -> None:
    endless = Sampling(temperature=0, logit_bias=dict.fromkeys(tiny.model.end_tokens, -1000000000.0))
    result, shown = run(tiny, ask(tools=(ALARM,), tool_choice="required", max_tokens=900, sampling=endless))
    assert len(result.tool_calls) == tools.MAX_CALLS
    assert {call.name for call in result.tool_calls} == {"set_alarm"}
    assert shown == ""
    one, _ = run(tiny, ask(tools=(ALARM,), tool_choice="required", parallel_calls=False, sampling=endless))
    assert len(one.tool_calls) == 1


def test_a_truncated_call_is_a_failure_that_keeps_its_text(tiny: LlamaEngine) -> None:
    with pytest.raises(StepFailure, match="inside a tool call") as caught:
        run(tiny, ask(tool_choice="required", max_tokens=12))
    assert caught.value.reason is FailureReason.INVALID_OUTPUT
    assert caught.value.text is not None
    assert caught.value.text.startswith(OPENING)


def test_with_none_the_prompt_has_no_tools(tiny: LlamaEngine) -> None:
    with_none, _ = run(tiny, ask(tool_choice="none", max_tokens=4))
    without, _ = run(tiny, ask(tools=(), max_tokens=4))
    assert (with_none.tokens_in, with_none.text) == (without.tokens_in, without.text)


def test_invalid_tools_and_choices_are_rejected(tiny: LlamaEngine, shared: LlamaEngine) -> None:
    for request, word in (
        (ask(tool_choice=NamedTool("fly")), "'fly'; the tools are get_weather, set_alarm"),
        (ask(tools=(WEATHER, WEATHER)), "same name"),
        (ask(tools=(), tool_choice="required"), "the request has no tools"),
        (ask(prefill="Well. <tool_"), "prefill"),
        (ask(tools=(Tool("f", "", {"not": {}}),)), "not"),
    ):
        with pytest.raises(StepFailure, match=word) as caught:
            tiny.generate(request)
        assert caught.value.reason is FailureReason.INVALID_REQUEST
    with pytest.raises(StepFailure, match="set `tools` in its profile"):
        shared.generate(ask())


def test_schemas_of_tools_may_contain_references(tiny: LlamaEngine) -> None:
    days = {"type": "array", "items": {"$ref": "#/$defs/day"}, "minItems": 1, "maxItems": 2}
    schema = {"$defs": {"day": {"enum": ["mon", "tue"]}}, "properties": {"days": days}, "required": ["days"]}
    plan = Tool("plan", "Plans days", {"type": "object"} | schema)
    result, _ = run(tiny, ask(tools=(WEATHER, plan), tool_choice=NamedTool("plan")))
    assert set(result.tool_calls[0].arguments["days"]) <= {"mon", "tue"}


def test_tools_are_described_in_the_prompt(tiny: LlamaEngine) -> None:
    """SmolLM2's template does not support tools, so tools and earlier calls are described as text."""
    call = ChatMessage("assistant", "", (ToolCall("get_weather", {"city": "Cusco<|im_end|>"}),))
    prompt = tiny._template.prompt(ask(messages=(QUESTION, call, ChatMessage("tool", "Rain.")))).tokens
    text = b"".join(tiny.model.piece(token, special=True) for token in prompt).decode()
    assert "The weather of a city" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Cusco<|im_end|>"}}\n</tool_call>' in text
    assert "Rain." in text
    assert prompt.count(tiny.model.tokenize("<|im_end|>", add_special=False, parse_special=True)[0]) == 4


def test_a_template_that_supports_tools_gets_them(tiny: LlamaEngine) -> None:
    source = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}{% for c in m.tool_calls or [] %}({{ c.function.arguments | tojson }}){% endfor %}"
        "{{ m.content }}{% endfor %}<tool_call>"
    )
    template = type(tiny._template)(tiny.model, PromptProfile(chat_template=source))
    assert template.tools == "hermes"
    turns = (QUESTION, ChatMessage("assistant", "", (ToolCall("get_weather", {"city": "Lima"}),)))
    prompt = template.prompt(ask(messages=turns)).tokens
    text = b"".join(tiny.model.piece(token, special=True) for token in prompt).decode()
    assert text == '[get_weather][set_alarm]What is the weather in Cusco?({"city": "Lima"})<tool_call>'


def test_a_tag_that_is_a_control_token_is_text(make: MakeEngine, tiny_llama: Path, tmp_path: Path) -> None:
    """In some vocabularies `<tool_call>` is one control token; it opens a call nevertheless."""
    path, old = tmp_path / "tagged.gguf", "<repo_name>"
    assert len(old) == len(OPENING)
    path.write_bytes(tiny_llama.read_bytes().replace(_in_file(old), _in_file(OPENING), 1))
    engine = make(path, slots=1, profile=PromptProfile(tools="hermes"))
    (tag,) = (
        token for token in engine.model.control_tokens if engine.model.piece(token, special=True) == b"<tool_call>"
    )
    likely = Sampling(temperature=0, logit_bias={tag: 1e6})
    result, shown = run(engine, ask(max_tokens=200, parallel_calls=False, sampling=likely))
    assert result.tool_calls
    assert shown == result.text == ""


def _in_file(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()
