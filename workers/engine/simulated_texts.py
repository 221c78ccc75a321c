"""
What the simulated engine answers: marked texts, small values of a schema, tool calls, log-probabilities, vectors.

Equal requests have equal answers. Nothing here has a meaning.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

from app.inference.requests import GenerateRequest, NamedTool, TokenLogprob, Tool
from app.kernel.errors import FailureReason, StepFailure

#: The content of every text.
MARK = "[simulated] "
#: Characters per token.
CHARACTERS_PER_TOKEN = 4
#: Default number of dimensions of a vector.
DIMENSIONS = 64


def vector(text: str, width: int) -> tuple[float, ...]:
    """Return a vector of length 1."""
    digest = hashlib.shake_256(text.encode()).digest(2 * width)
    numbers = [int.from_bytes(digest[at : at + 2]) / 2**15 - 1 for at in range(0, 2 * width, 2)]
    length = math.hypot(*numbers) or 1.0
    return tuple(number / length for number in numbers)


def text(request: GenerateRequest, index: int = 0) -> str:
    """Return the text to write: max_tokens tokens of the mark, or a small value that conforms to the schema."""
    if request.schema is not None:
        return json.dumps(_value(request.schema, request.max_tokens * CHARACTERS_PER_TOKEN))
    mark = f"[simulated {index}] " if index else MARK
    room = request.max_tokens * CHARACTERS_PER_TOKEN
    written = (mark * (room // len(mark) + 1))[:room]
    return written[: min((at for stop in request.stop if (at := written.find(stop)) >= 0), default=room)]


def call(request: GenerateRequest) -> tuple[Tool, str] | None:
    """Return the tool that a request makes the model call, with small arguments as JSON; None for free text."""
    choice = request.tool_choice
    if not request.tools or choice in ("auto", "none"):
        return None
    named = choice.name if isinstance(choice, NamedTool) else request.tools[0].name
    tool = next((tool for tool in request.tools if tool.name == named), None)
    if tool is None:
        raise StepFailure(FailureReason.INVALID_REQUEST, f"tool_choice names {named!r}, which is no tool")
    return tool, json.dumps(_value(tool.parameters, request.max_tokens * CHARACTERS_PER_TOKEN))


def logprobs(piece: str, request: GenerateRequest) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities of a piece, which is one token."""
    if request.logprobs is None:
        return ()
    data = piece.encode()
    token = zlib.crc32(data) % 2**16
    top = tuple((token + place, data, -0.5 - place) for place in range(request.logprobs))
    return (TokenLogprob(token, data, -0.5, top),)


def _value(schema: Mapping[str, Any], room: int) -> Any:
    """
    Return a small value for a schema. For unsupported keywords it may not conform; every answer is validated.

    Raises StepFailure, before creating the value, when its JSON has more than `room` characters.
    """
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return _value(schema[choice][0], room)
    kind = schema.get("type", "object")
    match kind[0] if isinstance(kind, list | tuple) else kind:
        case "object":
            properties = schema.get("properties", {})
            made: dict[str, Any] = {}
            for key in properties:
                if key in schema.get("required", ()):
                    made[key] = _value(properties[key], room)
                    room -= len(json.dumps(made[key]))
            return made
        case "array":
            item, count = _value(schema.get("items", {"type": "null"}), room), int(schema.get("minItems", 0))
            return [item] * _fits(count, len(json.dumps(item)), room)
        case "string":
            least, most = int(schema.get("minLength", 0)), int(schema.get("maxLength", len(MARK)))
            return MARK.strip().ljust(_fits(least, 1, room), ".")[: max(most, least)]
        case "integer" | "number":
            return max(schema.get("minimum", 0), schema.get("exclusiveMinimum", -1) + 1)
        case "boolean":
            return True
    return None


def _fits(count: int, size: int, room: int) -> int:
    """Return `count`. Raises StepFailure when so many values of `size` characters have no room."""
    if count * size > room:
        raise StepFailure(FailureReason.INVALID_OUTPUT, "a text that conforms to the schema is longer than max_tokens")
    return count
