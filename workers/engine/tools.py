"""
Tools: the grammar that binds a model's calls to the tools that were offered.

With `auto` the model writes freely until it begins a call, in the way of its family; from there on the call is forced
into the form. With `required` the text is a call from its beginning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app.inference.requests import GenerateRequest, Tool
from app.kernel.errors import FailureReason, StepFailure
from workers.engine.grammars import Form, Grammars

#: How each family begins and ends a call, its name for the arguments, and the pattern that wakes the grammar.
_STYLES: Mapping[str, tuple[str, str, str, str]] = {
    "hermes": ("<tool_call>\n", "\n</tool_call>", "arguments", r"[\s\S]*?(<tool_call>[\s\S]*)"),
    "llama3": ("", "", "parameters", r"\s*(\{[\s\S]*)"),
}


def form(grammars: Grammars, request: GenerateRequest, style: str | None) -> Form:
    """The form of a text that may call the request's tools. Raises StepFailure when the model has no way to."""
    names = [tool.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise StepFailure(FailureReason.INVALID_REQUEST, "two tools have the same name")
    if style is None:
        message = "the model's template says nothing of tools; set `tools` in its profile ('hermes' or 'llama3')"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    opening, closing, arguments, trigger = _STYLES[style]
    source = grammars.gbnf_of({"anyOf": [_call(tool, arguments) for tool in request.tools]})
    if opening:
        source = source.replace("root ::=", "call ::=", 1)
        source = f"root ::= {json.dumps(opening)} call {json.dumps(closing)}\n{source}"
    return grammars.of_gbnf(source) if request.tool_choice == "required" else grammars.lazy(source, trigger)


def _call(tool: Tool, arguments: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, arguments: dict(tool.parameters)},
        "required": ["name", arguments],
        "additionalProperties": False,
    }
