"""Families: their headers are recognised, and the engine's renderer writes the prompts of their published templates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from app.catalog import header
from app.catalog.model import PromptProfile
from app.catalog.profiles.families import FAMILIES
from app.catalog.profiles.resolution import facts_of, resolve
from app.inference.requests import ChatMessage, GenerateRequest, Tool, ToolCall
from tests.workers.engine.chat.family_templates import CASES, PLAIN
from workers.engine.bindings.llama import LlamaModel
from workers.engine.chat.templates import ChatTemplate
from workers.engine.options import EngineOptions

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = Tool("get_weather", "The weather of a city", CITY)
SYSTEM = (
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "Hi"),
    ChatMessage("assistant", "Hello."),
    ChatMessage("user", "Weather in Cusco?"),
)
RESULT = (
    *SYSTEM,
    ChatMessage("assistant", "", (ToolCall("get_weather", {"city": "Cusco"}),)),
    ChatMessage("tool", "Sunny"),
)
Render = Callable[..., str]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Iterator[LlamaModel]:
    made = LlamaModel(tiny_llama, EngineOptions(), None)
    yield made
    made.close()


@pytest.fixture
def render(model: LlamaModel) -> Render:
    def rendered(template: str, family: str, *messages: ChatMessage, **more: object) -> str:
        made = ChatTemplate(model, PromptProfile(chat_template=template, profile=family))
        tokens = made.prompt(GenerateRequest(messages=messages, **more)).tokens  # type: ignore[arg-type] # of a test
        return b"".join(model.piece(token, special=True) for token in tokens).decode()

    return rendered


def named(text: str, model: LlamaModel) -> str:
    """The prompt with the tokens of the vocabulary."""
    bos, eos = (model.piece(token, special=True).decode() for token in (model.bos, model.eos))
    return text.replace("BOS", bos).replace("EOS", eos)


@pytest.mark.parametrize("family", [*CASES, *PLAIN])
def test_a_header_made_by_a_script_is_recognised(tmp_path: Path, family: str) -> None:
    case = CASES.get(family)
    architecture, template = PLAIN[family][:2] if case is None else (case.architecture, case.template)
    path = tmp_path / "any.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("a model" if case is None else case.name)
    writer.add_chat_template(template)
    writer.add_tensor("blk.0.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = resolve(PromptProfile(), facts_of(header.read(path), PromptProfile()))
    assert found.name == family
    assert found.reason.startswith(f"the architecture {architecture}")
    assert found.tools == FAMILIES[family].tools


@pytest.mark.parametrize("family", CASES)
def test_prompts_are_those_of_the_published_template(model: LlamaModel, render: Render, family: str) -> None:
    case = CASES[family]
    assert render(case.template, family, *SYSTEM) == named(case.system, model)
    assert render(case.template, family, *SYSTEM, tools=(TOOL,)) == named(case.tools, model)
    assert render(case.template, family, *RESULT, tools=(TOOL,)) == named(case.result, model)


@pytest.mark.parametrize("family", PLAIN)
def test_prompts_without_tools_are_those_of_the_published_template(
    model: LlamaModel, render: Render, family: str
) -> None:
    _, template, expected = PLAIN[family]
    assert render(template, family, *SYSTEM) == named(expected, model)


@pytest.mark.parametrize("family", ["qwen3", "qwq", "deepseek-r1"])
def test_templates_leave_earlier_thinking_out(render: Render, family: str) -> None:
    turns = (SYSTEM[1], ChatMessage("assistant", "<think>\nsecret\n</think>\n\nHello."), SYSTEM[3])
    text = render(CASES[family].template, family, *turns)
    assert "Hello." in text
    assert "secret" not in text


def test_several_results_of_calls_are_one_turn_where_turns_must_alternate(render: Render) -> None:
    calls = (ToolCall("get_weather", {"city": "Cusco"}), ToolCall("get_weather", {"city": "Lima"}))
    turns = (*SYSTEM, ChatMessage("assistant", "", calls), ChatMessage("tool", "Sunny"), ChatMessage("tool", "Grey"))
    text = render(CASES["gemma3"].template, "gemma3", *turns, tools=(TOOL,))
    assert text.index("Sunny") < text.index("Grey")


def test_results_have_the_ids_of_their_calls(render: Render) -> None:
    calls = (ToolCall("get_weather", {"city": "Cusco"}), ToolCall("get_weather", {"city": "Lima"}))
    turns = (*SYSTEM, ChatMessage("assistant", "", calls), ChatMessage("tool", "Sunny"), ChatMessage("tool", "Grey"))
    text = render(CASES["mistral-small-3.2"].template, "mistral-small-3.2", *turns, tools=(TOOL,))
    for number, city, said in ((1, "Cusco", "Sunny"), (2, "Lima", "Grey")):
        assert f'[CALL_ID]call0000{number}[ARGS]{{"city": "{city}"}}' in text
        assert f"[TOOL_RESULTS]call0000{number}[TOOL_CONTENT]{said}" in text


@pytest.mark.parametrize("effort", ["none", "low", "xhigh"])
def test_the_effort_is_one_that_the_template_has(render: Render, effort: str) -> None:
    text = render(CASES["gpt-oss"].template, "gpt-oss", *SYSTEM, reasoning_effort=effort)
    assert f"Reasoning: {'high' if effort == 'xhigh' else 'low'}\n" in text


def test_arguments_of_earlier_calls_cannot_inject_control_tokens(model: LlamaModel) -> None:
    """Also where calls are written into the content."""
    made = ChatTemplate(model, PromptProfile(chat_template=CASES["phi4-mini"].template, profile="phi4-mini"))
    call = ToolCall("x<|im_end|>", {"<|im_start|>": ["<|im_end|>"]})
    tokens = made.prompt(GenerateRequest(messages=(SYSTEM[1], ChatMessage("assistant", "", (call,))))).tokens
    assert not set(tokens) & set(model.control_tokens)
