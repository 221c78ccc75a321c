"""Request bodies: JSON or YAML, parsed into plain data with line numbers, under bounds and off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.kernel.errors import InvalidDefinition, InvalidInput, Problem
from app.workflows.language import source
from app.workflows.language.shape_errors import nearest
from app.workflows.language.source import SourceDocument

JSON = "application/json"
YAML = "application/yaml"
_YAML_TYPES = {YAML, "application/x-yaml", "text/yaml", "text/x-yaml"}

M = TypeVar("M", bound=BaseModel)


class UnsupportedMediaType(InvalidInput):
    """The media type of the body is not supported."""

    what = "media type"


async def _raw(request: Request) -> bytes:
    return await request.body()


def _read(request: Request, raw: Annotated[bytes, Depends(_raw)]) -> SourceDocument:
    """Parse the body on a thread: this may take long, and must not block other requests on the event loop."""
    media_type = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if media_type != JSON and not media_type.endswith("+json") and media_type not in _YAML_TYPES:
        raise UnsupportedMediaType([Problem("Content-Type", f"{media_type!r} is not supported", f"{JSON}, {YAML}")])
    try:
        return source.read(raw.decode("utf-8"), "yaml" if media_type in _YAML_TYPES else "json")
    except InvalidDefinition as error:
        raise InvalidInput(error.problems, "body") from None
    except UnicodeDecodeError as error:
        raise InvalidInput([Problem("", f"the body is not valid UTF-8: {error}")], "body") from None


#: The type of an endpoint's argument that receives the body as it came.
RawBody = Annotated[bytes, Depends(_raw)]
#: The type of an endpoint's argument that receives the body as plain data.
RequestBody = Annotated[SourceDocument, Depends(_read)]


def parse_json(raw: bytes) -> Any:
    """Return the plain data of a JSON body, under the bounds of all bodies. Raises InvalidInput."""
    try:
        return source.read(raw.decode("utf-8"), "json").data
    except InvalidDefinition as error:
        raise InvalidInput(error.problems, "body") from None
    except UnicodeDecodeError as error:
        raise InvalidInput([Problem("", f"the body is not valid UTF-8: {error}")], "body") from None


def of(model: type[M]) -> Any:
    """
    Return a dependency that parses the body and validates it as `model`.

    It does so on a thread and under the bounds of all bodies. FastAPI itself would do it on the event loop, without
    bounds.
    """

    def validated(request: Request, raw: Annotated[bytes, Depends(_raw)]) -> M:
        try:
            return model.model_validate(_read(request, raw).data)
        except ValidationError as error:
            fields = [field.alias or name for name, field in model.model_fields.items()]
            raise RequestValidationError([_of_body(one, fields) for one in error.errors(include_url=False)]) from None

    return Depends(validated)


def _of_body(error: ErrorDetails, fields: Sequence[str]) -> dict[str, Any]:
    """Return an error with its path in the request. An unknown field is answered with the accepted `fields`."""
    # Parts in angle brackets are alternatives of types, which clients do not write.
    found = {**error, "loc": ("body", *(part for part in error["loc"] if not str(part).startswith("<")))}
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        found |= {"msg": "there is no such field here", "accepted": nearest(str(error["loc"][0]), fields)}
    return found


def documented_as(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of the request body of an operation that uses `of(model)`."""
    return documented({"$ref": f"#/components/schemas/{model.__name__}"}, {})


def documented(schema: dict[str, Any], examples: dict[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI description of the request body of an operation."""
    content: dict[str, Any] = {"schema": schema}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": dict.fromkeys((JSON, YAML), content)}}
