"""The form of a tool: its name, what it takes and gives, how it may be used, and the function that does it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from app.kernel.errors import Problem
from app.mcp_server.api import Api, Refused

#: Tells the client how far a call is: how much is done, of how much, and a sentence.
ReportProgress = Callable[[float, float | None, str], Awaitable[None]]

#: A name, an id or a selector of something.
NameText = Annotated[str, StringConstraints(min_length=1, max_length=200)]
#: A text for a model.
PromptText = Annotated[str, StringConstraints(min_length=1, max_length=400_000)]
#: Seconds that a call waits for the end of its task. After that it returns the task as it is.
WaitSeconds = Annotated[float, Field(ge=0, le=3_600)]


class ToolArguments(BaseModel):
    """Arguments of a tool. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")


A = TypeVar("A", bound=ToolArguments)


@dataclass(frozen=True, slots=True)
class McpCall(Generic[A]):
    """A call of a tool by a client."""

    api: Api
    arguments: A
    progress: ReportProgress


@dataclass(frozen=True, slots=True)
class ServedTool(Generic[A]):
    """A tool."""

    name: str
    title: str
    #: What it does and when to use it, for models.
    description: str
    arguments: type[A]
    #: The JSON Schema of its structured result.
    output: Mapping[str, Any]
    run: Callable[[McpCall[A]], Awaitable[dict[str, Any]]]
    #: It changes nothing.
    reads_only: bool = False
    #: It may remove what cannot be restored.
    destroys: bool = False
    #: Calling it again with the same arguments changes nothing more.
    idempotent: bool = False

    async def call(self, api: Api, given: Mapping[str, Any], progress: ReportProgress) -> dict[str, Any]:
        """Check the arguments and do it. Raises Refused."""
        return await self.run(McpCall(api, checked(self.arguments, given), progress))


def checked(kind: type[A], given: Mapping[str, Any]) -> A:
    """Return arguments of a kind. Raises Refused with every problem."""
    try:
        return kind.model_validate_json(json.dumps(dict(given)), strict=True)
    except ValidationError as error:
        raise Refused(
            "invalid arguments", [_problem(kind, one) for one in error.errors(include_url=False)[:20]]
        ) from None


def _problem(kind: type[ToolArguments], item: Any) -> Problem:
    where, message, accepted = ".".join(map(str, item["loc"])), str(item["msg"]).removeprefix("Value error, "), ""
    if item["type"] == "extra_forbidden":
        message, accepted = "unknown argument", ", ".join(kind.model_fields)
    elif item["type"] == "missing":
        message = "this argument is missing"
        field = kind.model_fields.get(where)
        accepted = (field.description or "") if field else ""
    elif not isinstance(item["input"], dict | list):
        shown = repr(item["input"])
        message = f"{shown if len(shown) <= 80 else shown[:79] + '…'}: {message}"
    return Problem(where, message, accepted)


def object_of(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of an object with these properties, and others."""
    return {"type": "object", "properties": dict(properties)}
