"""Bodies: JSON or YAML, read into plain data that remembers its lines."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from app.kernel.errors import InvalidInput, Problem
from app.workflows.language import source
from app.workflows.language.source import DefinitionSource

JSON = "application/json"
YAML = "application/yaml"
_YAMLS = {YAML, "application/x-yaml", "text/yaml", "text/x-yaml"}


class UnsupportedMediaType(InvalidInput):
    """The body is of a media type that is not offered here."""

    what = "media type"


async def _raw(request: Request) -> bytes:
    return await request.body()


def _read(request: Request, raw: Annotated[bytes, Depends(_raw)]) -> DefinitionSource:
    """The body, read on a thread: it may take long, and the event loop has other requests to serve."""
    media_type = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if media_type != JSON and not media_type.endswith("+json") and media_type not in _YAMLS:
        raise UnsupportedMediaType([Problem("Content-Type", f"{media_type!r} is not offered", f"{JSON}, {YAML}")])
    try:
        return source.read(raw.decode("utf-8"), "yaml" if media_type in _YAMLS else "json")
    except UnicodeDecodeError as error:
        raise InvalidInput([Problem("", f"the body is no UTF-8: {error}")], "body") from None


#: An argument of an endpoint: the body as plain data.
RequestBody = Annotated[DefinitionSource, Depends(_read)]


def documented(schema: dict[str, Any], examples: dict[str, Any], *, yaml: bool = True) -> dict[str, Any]:
    """The request body of an operation, for its OpenAPI document."""
    content: dict[str, Any] = {"schema": schema, "examples": {name: {"value": v} for name, v in examples.items()}}
    types = (JSON, YAML) if yaml else (JSON,)
    return {"requestBody": {"required": True, "content": dict.fromkeys(types, content)}}
