"""Tool calls as text: detected wherever the text is split, parsed, and described to templates without tools."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.inference.requests import ChatMessage, ImageInput, Tool, ToolCall
from workers.engine.chat import calls
from workers.engine.chat.calls import ToolCallDetector, ToolCallStyle
from workers.engine.text import TextStream

STYLES: list[ToolCallStyle] = ["hermes", "llama3"]
ONE = ToolCall("weather", {"city": "</tool_call> 🦙", "days": [1, {"a": None}]})
TWO = ToolCall("stop", {})


def streamed(text: str, cuts: list[int], style: ToolCallStyle, *stops: str) -> tuple[str, str, list[str]]:
    """Return the text, the calls, and the pieces that a reader received."""
    data = text.encode()
    stream, shown = TextStream(stops, ToolCallDetector(style)), []
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for begin, end in itertools.pairwise(edges):
        shown.append(stream.feed(data[begin:end]))
    shown.append(stream.finish())
    return stream.text, stream.calls, shown


@given(
    st.text("ab <\n{ü", max_size=12).filter(lambda text: "<tool_call>" not in text),
    st.lists(st.integers(0, 200)),
    st.booleans(),
)
def test_no_part_of_a_call_is_emitted_as_text(before: str, cuts: list[int], called: bool) -> None:
    written = calls.render([ONE, TWO], "hermes") if called else ""
    text, kept, pieces = streamed(before + written, cuts, "hermes")
    assert (text, kept) == (before, written)
    assert "".join(pieces) == before


@given(st.lists(st.integers(0, 200)), st.sampled_from(["", " ", "\n\n"]))
def test_a_call_can_be_the_whole_answer(cuts: list[int], before: str) -> None:
    written = calls.render([ONE], "llama3").replace('{"name":', '{\n  "name" :', 1)
    text, kept, _ = streamed(before + written, cuts, "llama3")
    assert (text, kept) == (before, written)
    assert calls.parse(kept, "llama3") == (ONE,)
    assert json.loads(calls.normalise_start(kept, "llama3")) == json.loads(written)


@pytest.mark.parametrize(
    "text", ["Hello", '{"names": 1}', '{"a": {"name": 1}}', 'Well, {"name": "weather"}', "", "{", '{"na', " "]
)
def test_answers_that_are_not_calls_are_texts(text: str) -> None:
    for cuts in ([], list(range(40))):
        assert streamed(text, cuts, "llama3")[:2] == (text, "")


def test_an_incomplete_opening_tag_is_text() -> None:
    assert streamed("a <tool_cal", list(range(20)), "hermes")[:2] == ("a <tool_cal", "")
    assert streamed("a <b <tool_call x", list(range(20)), "hermes")[:2] == ("a <b <tool_call x", "")


def test_stop_texts_end_texts_but_not_calls() -> None:
    written = calls.render([ONE], "hermes")
    assert streamed(f"Yes. {written}", [7, 9, 12], "hermes", "\n", "city")[:2] == ("Yes. ", written)
    assert streamed(f"Yes.\n{written}", [7, 9, 12], "hermes", "\n")[:2] == ("Yes.", "")


def test_rendered_calls_parse_to_the_same_calls() -> None:
    assert calls.parse(calls.render([ONE, TWO, ONE], "hermes"), "hermes") == (ONE, TWO, ONE)
    assert calls.parse(calls.render([ONE], "llama3"), "llama3") == (ONE,)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "a", "arguments": {}}',
        '<tool_call>{"name": "a", "arguments": {}}</tool_call> and',
        '<tool_call>{"name": "a"}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>["a"]</tool_call>',
        "<tool_call>{",
    ],
)
def test_invalid_calls_are_rejected(text: str) -> None:
    with pytest.raises(ValueError):
        calls.parse(text, "hermes")


@pytest.mark.parametrize("style", STYLES)
def test_tools_are_described_to_a_template_without_tools(style: ToolCallStyle) -> None:
    tool = Tool("weather", "The weather", {"type": "object", "properties": {"city": {"type": "string"}}})
    turns = (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "Rain?"),
        ChatMessage("assistant", "", (TWO,)),
        ChatMessage("tool", "wet"),
    )
    system, user, assistant, result = calls.describe_tools(turns, (tool,), style)
    assert system.content.startswith("Be brief.")
    assert "city" in system.content
    assert calls.ARGUMENTS[style] in system.content
    assert user == turns[1]
    assert calls.parse(assistant.content, style) == (TWO,)
    assert (result.role, "wet" in result.content) == ("user", True)
    assert calls.describe_tools(turns[1:2], (tool,), style)[0].role == "system"


def test_references_of_an_embedded_schema_are_rebased() -> None:
    schema = {"$defs": {"a": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/a"}, "$ref": {"const": "#"}}}
    moved = calls.rebase(schema, "#/anyOf/0/properties/arguments")
    assert moved["properties"]["x"] == {"$ref": "#/anyOf/0/properties/arguments/$defs/a"}
    assert moved["properties"]["$ref"] == {"const": "#"}


def test_the_image_of_a_tools_result_keeps_its_place() -> None:
    seen = ChatMessage("tool", "before after", images=(ImageInput(7, "file-x", "messages[0]"),))
    (plain,) = calls.describe_tools([seen], (), "hermes")
    (image,) = plain.images
    assert plain.content[: image.at].endswith("before ")
    assert plain.content[image.at :].startswith("after")
