"""The scanner of tool calls: whatever the pieces, it finds the names and the exact characters of the arguments."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from app.inference.requests import ToolCallPiece
from workers.engine.chat.call_forms import parse
from workers.engine.chat.call_scanner import ToolCallScanner, arguments_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(st.text(), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.text(min_size=1), ARGUMENTS), min_size=1, max_size=3)


def scanned(text: str, sizes: list[int]) -> list[ToolCallPiece]:
    scanner, found, at = ToolCallScanner("arguments"), [], 0
    while at < len(text):
        at += sizes[at % len(sizes)]
        found += scanner.feed(text[:at])
    return found


@settings(max_examples=40)
@given(CALLS, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([None, 1]))
def test_calls_are_found_in_any_pieces(
    given_calls: list[tuple[str, dict[str, object]]], sizes: list[int], indent: int | None
) -> None:
    texts = [json.dumps({"name": name, "arguments": arguments}, indent=indent) for name, arguments in given_calls]
    written = "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    found = scanned(written, sizes)
    assert [(one.place, one.name) for one in found if one.name is not None] == [
        (place, name) for place, (name, _) in enumerate(given_calls)
    ]
    parsed = parse(written, "hermes")
    for place, (_, arguments) in enumerate(given_calls):
        whole = "".join(one.arguments for one in found if one.place == place)
        assert json.loads(whole) == arguments
        assert whole == parsed[place].written


def test_a_nested_name_or_bracket_is_no_call() -> None:
    call = '{"name": "a", "arguments": {"name": "b", "x": "}]{\\"", "arguments": {"y": [1, {}]}}}'
    assert [one.name for one in ToolCallScanner("arguments").feed(call) if one.name] == ["a"]
    assert arguments_of(call, "arguments") == call[len('{"name": "a", "arguments": ') : -1]
