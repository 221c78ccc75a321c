"""Tool calls as text: detected wherever the text is split, parsed, and described to templates without tools."""

from __future__ import annotations

import itertools
import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalog.profiles.family import ToolCallStyle
from app.inference.requests import ChatMessage, ImageInput, Tool, ToolCall
from workers.engine.chat import calls
from workers.engine.chat.call_forms import FORMS, parse, render, scanner
from workers.engine.chat.calls import ToolCallDetector
from workers.engine.text import TextStream

STYLES = get_args(ToolCallStyle)
#: Those whose texts can have several calls.
SEVERAL = [style for style in STYLES if FORMS[style].repeats]
TYPES = {"city": {"type": "string"}, "days": {"type": "array"}, "at": {"type": ["string", "null"]}}
TOOLS = (Tool("weather", "", {"type": "object", "properties": TYPES}), Tool("stop"))
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
    written = render([ONE, TWO], "hermes") if called else ""
    text, kept, pieces = streamed(before + written, cuts, "hermes")
    assert (text, kept) == (before, written)
    assert "".join(pieces) == before


@given(st.lists(st.integers(0, 200)), st.sampled_from(["", " ", "\n\n"]))
def test_a_call_can_be_the_whole_answer(cuts: list[int], before: str) -> None:
    written = render([ONE], "llama3").replace('{"name":', '{\n  "name" :', 1)
    text, kept, _ = streamed(before + written, cuts, "llama3")
    assert (text, kept) == (before, written)
    assert parse(kept, "llama3") == (ONE,)
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
    written = render([ONE], "hermes")
    assert streamed(f"Yes. {written}", [7, 9, 12], "hermes", "\n", "city")[:2] == ("Yes. ", written)
    assert streamed(f"Yes.\n{written}", [7, 9, 12], "hermes", "\n")[:2] == ("Yes.", "")


@pytest.mark.parametrize("style", STYLES)
def test_rendered_calls_parse_to_the_same_calls(style: ToolCallStyle) -> None:
    assert parse(render([ONE], style), style, TOOLS) == (ONE,)
    if style in SEVERAL:
        assert parse(render([ONE, TWO, ONE], style), style, TOOLS) == (ONE, TWO, ONE)


@pytest.mark.parametrize("style", STYLES)
def test_calls_are_detected_and_scanned_wherever_pieces_end(style: ToolCallStyle) -> None:
    """At every place where the text can be divided, and character by character."""
    made = [ONE, TWO] if style in SEVERAL else [ONE]
    before = "Well." if FORMS[style].marker else ""
    written = render(made, style)
    data = (before + written).encode()
    for cuts in (*([at] for at in range(len(data) + 1)), list(range(len(data)))):
        text, kept, _ = streamed(before + written, cuts, style)
        assert (text, kept) == (before, written), cuts
    for size in (1, 2, 7, len(written)):
        reader, found = scanner(style, TOOLS), []
        for at in range(size, len(written) + size, size):
            found += reader.feed(written[:at])
        assert [(one.place, one.name) for one in found if one.name] == [(n, call.name) for n, call in enumerate(made)]
        parsed = parse(written, style, TOOLS)
        for place, call in enumerate(parsed):
            assert "".join(one.arguments for one in found if one.place == place) == call.written
            assert json.loads(call.written) == call.arguments


#: As the publishers' templates and documentation write them.
PUBLISHED: list[tuple[ToolCallStyle, str, list[tuple[str, Any]]]] = [
    ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}, "id": "abcdefghi"}]', [("a", {"x": 1})]),
    ("mistral", '[TOOL_CALLS][{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]', [("a", {}), ("b", {})]),
    ("mistral-args", '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}', [("a", {"x": 1}), ("b", {})]),
    ("mistral-args", '[TOOL_CALLS]a[CALL_ID]abcdefghi[ARGS]{"x": "]"}', [("a", {"x": "]"})]),
    ("phi4", '<|tool_call|>[{"name": "a", "arguments": {"x": 1}}]<|/tool_call|>', [("a", {"x": 1})]),
    ("phi4", '<|tool_call|>[{"name": "a", "arguments": {"x": 1}}]', [("a", {"x": 1})]),
    ("harmony", '<|channel|>commentary to=functions.a <|constrain|>json<|message|>{"x": 1}', [("a", {"x": 1})]),
    ("harmony", '<|channel|>commentary to=functions.get_json<|message|>{"x": 1}', [("get_json", {"x": 1})]),
    ("harmony", '<|channel|>commentary to=functions.a<|channel|>commentary json<|message|>{}', [("a", {})]),
    (
        "coder",
        ("<tool_call>\n<function=weather>\n<parameter=city>\nLa Paz\nBolivia\n</parameter>\n<parameter=days>\n[1, 2]\n"
        "</parameter>\n<parameter=at>\nnull\n</parameter>\n</function>\n</tool_call>"),
        [("weather", {"city": "La Paz\nBolivia", "days": [1, 2], "at": None})],
    ),
    ("coder", "<tool_call>\n<function=stop>\n</function>\n</tool_call>", [("stop", {})]),
    ("coder", "<tool_call><function=weather><parameter=days>soon</parameter></function></tool_call>",
     [("weather", {"days": "soon"})]),
]  # fmt: skip


@pytest.mark.parametrize(("style", "text", "expected"), PUBLISHED)
def test_calls_are_read_as_they_are_published(style: ToolCallStyle, text: str, expected: list[tuple[str, Any]]) -> None:
    found = parse(text, style, TOOLS)
    assert [(call.name, dict(call.arguments)) for call in found] == expected
    pieces = scanner(style, TOOLS).feed(text)
    for place, call in enumerate(found):
        written = "".join(one.arguments for one in pieces if one.place == place)
        assert json.loads(written) == call.arguments
        assert written == call.written


PARTS = [
    *("<tool_call>", "</tool_call>", "<function=weather>", "<parameter=city>", "</parameter>", "</function>", "[ARGS]"),
    *("[TOOL_CALLS]", "[", "]", "{", "}", '"name"', ":", '"a"', ",", "\\", "<|tool_call|>", "<|message|>", "weather"),
    *('{"name": "weather", "arguments": {', "<|channel|>commentary to=functions.", "[" * 2_000, "\n", "null"),
]


@given(st.sampled_from(STYLES), st.lists(st.sampled_from(PARTS), max_size=12))
def test_whatever_a_model_writes_is_calls_or_a_value_error(style: ToolCallStyle, parts: list[str]) -> None:
    """And nothing of it is lost: what is no call is text."""
    text = "".join(parts)
    rest, kept, pieces = streamed(text, list(range(0, len(text), 3)), style)
    assert rest + kept == text
    assert "".join(pieces) == rest
    scanner(style, TOOLS).feed(kept)
    try:
        found = parse(kept, style, TOOLS)
    except ValueError:
        return
    assert all(isinstance(call.arguments, dict) for call in found)


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
        parse(text, "hermes")


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
    assert ("city" if style == "coder" else "an argument") in system.content
    assert user == turns[1]
    assert parse(assistant.content, style, TOOLS) == (TWO,)
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
