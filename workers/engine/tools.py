"""
Tools: the grammar that binds a model's calls to the tools that were offered.

With `auto` the model writes freely until a call begins (see `lazy`). With `required`, or a named tool, the text is made
of calls from its beginning.
"""

from __future__ import annotations

import json
from typing import Any

from app.inference.requests import GenerateRequest, NamedTool, Tool
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import calls
from workers.engine.calls import Style
from workers.engine.grammars import Form, Grammars

#: Calls in one text at the most: a small model repeats itself.
MOST_CALLS = 16


def form(grammars: Grammars, request: GenerateRequest, style: Style | None) -> Form:
    """The form of calls of the request's tools. Raises StepFailure when the model has no way to call them."""
    names = [tool.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise StepFailure(FailureReason.INVALID_REQUEST, "two tools have the same name")
    if style is None:
        message = "the model's template says nothing of tools; set `tools` in its profile ('hermes' or 'llama3')"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    offered, most = request.tools, MOST_CALLS if request.parallel_calls else 1
    if isinstance(request.tool_choice, NamedTool):
        offered, most = tuple(tool for tool in offered if tool.name == request.tool_choice.name), 1
        if not offered:
            message = f"tool_choice names {request.tool_choice.name!r}; the tools are {', '.join(names)}"
            raise StepFailure(FailureReason.INVALID_REQUEST, message)
    schema = {"anyOf": [_call(tool, calls.ARGUMENTS[style], f"#/anyOf/{at}") for at, tool in enumerate(offered)]}
    source = grammars.gbnf_of(schema)
    if style == "hermes":
        # The converter's names have no upper case.
        opening, closing = json.dumps(calls.OPENING), json.dumps(calls.CLOSING)
        source = source.replace("root ::=", "Call ::=", 1)
        source = f"Tagged ::= {opening} White Call White {closing}\nWhite ::= [ \\n]{{0,2}}\n{source}"
        more = f" (White Tagged){{0,{most - 1}}}" if most > 1 else ""
        source = f"root ::= Tagged{more}\n{source}"
    return grammars.of_gbnf(source)


def _call(tool: Tool, arguments: str, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.name},
            arguments: calls.under(tool.parameters, f"{place}/properties/{arguments}"),
        },
        "required": ["name", arguments],
        "additionalProperties": False,
    }
