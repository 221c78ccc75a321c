"""
Tool grammars: the grammar that constrains a model's tool calls to the tools of the request.

With `auto` the model writes free text until a call begins (see `lazy_grammar`). With `required` or a named tool, the
text consists of calls from its beginning, or from the end of its thinking.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.catalog.profiles.family import ToolCallStyle
from app.inference.requests import GenerateRequest, NamedTool, Tool
from app.kernel.errors import FailureReason, StepFailure
from workers.engine.chat import calls, coder_calls
from workers.engine.chat.call_forms import FORMS, CallForm
from workers.engine.sampling.grammars import CompiledGrammar, GrammarCache

#: Most calls in one text, because a small model repeats itself.
MAX_CALLS = 16

#: The rules of whitespace and of a text of the style `coder`. Upper case avoids collisions: the schema converter uses
#: lower-case rule names only. A text ends before the first `</parameter>`; the parser finds that as well.
_WHITE = "White ::= [ \\n]{0,2}"
_TEXT = 'Text ::= ([^<] | "<" [^/] | "</" [^p] | "</p" [^a] | "</pa" [^r] | "</par" [^a] | "</para" [^m])*'
#: What GBNF has beside names of rules: literals and classes of characters.
_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|([a-z][a-z0-9-]*)')


def compile_tools(grammars: GrammarCache, request: GenerateRequest, style: ToolCallStyle | None) -> CompiledGrammar:
    """Return the grammar of calls of the request's tools. Raises StepFailure when the model cannot call tools."""
    names = [tool.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise StepFailure(FailureReason.INVALID_REQUEST, "two tools have the same name; names must be unique")
    if style is None:
        message = "the model's chat template has no tools; set `tools` in its profile to 'hermes' or 'llama3'"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    offered, limit = request.tools, MAX_CALLS if request.parallel_calls else 1
    if isinstance(request.tool_choice, NamedTool):
        offered, limit = tuple(tool for tool in offered if tool.name == request.tool_choice.name), 1
        if not offered:
            message = f"tool_choice names {request.tool_choice.name!r}; the tools are {', '.join(names)}"
            raise StepFailure(FailureReason.INVALID_REQUEST, message)
    form = FORMS[style]
    if style == "coder" or form.name_end:
        bodies = [_coder(grammars, tool, at) if style == "coder" else _named(grammars, tool, at, form)
                  for at, tool in enumerate(offered)]  # fmt: skip
        rules = [f"Call ::= {' | '.join(name for name, _ in bodies)}", *(source for _, source in bodies)]
    else:
        schema = {"anyOf": [_object(tool, form, f"#/anyOf/{at}") for at, tool in enumerate(offered)]}
        rules = [grammars.gbnf_for_schema(schema).replace("root ::=", "Call ::=", 1)]
    return grammars.for_gbnf("\n".join([*_around(form, limit if form.repeats else 1), *rules, _WHITE, _TEXT]))


def _around(form: CallForm, limit: int) -> Iterator[str]:
    """Yield the rules of the text with all calls, each of which is the rule `Call`."""
    opened = f"{json.dumps(form.opening, ensure_ascii=False)} " if form.opening else ""
    closed = f" {json.dumps(form.closing, ensure_ascii=False)}" if form.closing else ""
    if form.opening.startswith("<tool_call>"):
        opened, closed = f"{opened}White ", f" White{closed}"
    yield f"Tagged ::= {opened}Call{closed}"
    between = '("," " "?)' if form.is_list else "White" if form.between or not form.repeats else ""
    more = f" ({between} Tagged){{0,{limit - 1}}}" if limit > 1 else ""
    calls_ = f'"[" Tagged{more} "]"' if form.is_list else f"Tagged{more}"
    before = f"{json.dumps(form.before, ensure_ascii=False)} White " if form.before else ""
    after = f" White {json.dumps(form.after, ensure_ascii=False)}" if form.after else ""
    yield f"root ::= {before}{calls_}{after}"


def _object(tool: Tool, form: CallForm, path: str) -> dict[str, Any]:
    """Return the schema of an object with the name and the arguments of a call."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "name": {"const": tool.name},
            form.key: calls.rebase(tool.parameters, f"{path}/properties/{form.key}"),
        },
        "required": ["name", form.key],
        "additionalProperties": False,
    }
    if form.before == "[TOOL_CALLS]":  # such models were trained with ids, and without
        schema["properties"]["id"] = {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
    return schema


def _named(grammars: GrammarCache, tool: Tool, at: int, form: CallForm) -> tuple[str, str]:
    """Return the rule of a call whose name stands before its arguments: its name and its source."""
    root, source = _prefixed(grammars.gbnf_for_schema(tool.parameters), at)
    name = json.dumps(tool.name, ensure_ascii=False)
    return f"Tool{at}", f"Tool{at} ::= {name} {form.name_end_rule} {root}\n{source}"


def _coder(grammars: GrammarCache, tool: Tool, at: int) -> tuple[str, str]:
    """As `_named`, for a call with its arguments one by one, in the order of the schema."""
    properties, required = tool.parameters.get("properties"), tool.parameters.get("required")
    if not isinstance(properties, Mapping):
        properties = {}
    needed = set(required) if isinstance(required, Sequence) and not isinstance(required, str) else set()
    rules, terms = [], []
    for place, (name, schema) in enumerate(properties.items()):
        if coder_calls.is_text(schema):
            listed = schema.get("enum")
            value = "Text" if not listed else f"({' | '.join(_literal(str(one)) for one in listed)})"
        else:
            whole = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
            rebased = {**whole, **schema} if isinstance(schema, Mapping) else schema
            value, source = _prefixed(grammars.gbnf_for_schema(rebased), at, place)
            rules.append(source)
        opening, closing = _literal(f"<parameter={name}>\n"), _literal("\n</parameter>\n")
        term = f"{opening} {value} {closing}"
        terms.append(term if name in needed else f"({term})?")
    body = " ".join([_literal(f"<function={tool.name}>\n"), *terms, _literal("</function>")])
    return f"Tool{at}", "\n".join([f"Tool{at} ::= {body}", *rules])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _prefixed(source: str, *numbers: int) -> tuple[str, str]:
    """Return the root of a grammar and its rules, with names that no other grammar has."""
    prefix = "p" + "-".join(map(str, numbers)) + "-"
    renamed = _PARTS.sub(lambda found: f"{prefix}{found[1]}" if found[1] else found[0], source)
    return f"{prefix}root", renamed
