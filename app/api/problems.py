"""
Problem details (RFC 9457): the format of every error of the API.

`type` names the error class, `detail` says what is wrong, `errors` lists each problem of an input with its path, its
line if the input is a text, and what would be accepted.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.units import durations

#: The media type of a problem.
MEDIA_TYPE = "application/problem+json"

#: Types of errors of pydantic for what has no fields.
_NO_OBJECT = frozenset({"model_type", "model_attributes_type", "dict_type", "dataclass_type"})
#: Most problems in an answer, and most characters of each text and of the detail: an answer repeats no long input.
MAX_PROBLEMS, _MAX_TEXT, _MAX_DETAIL = 1000, 2_000, 20_000


class FieldProblem(BaseModel):
    """One problem of an input."""

    where: str = Field(description="path of the field", examples=["steps[1].needs[0]"])
    message: str = Field(examples=["there is no step 'clasify'"])
    accepted: str = Field(default="", examples=["classify, draft; did you mean 'classify'?"])
    line: int | None = Field(default=None, description="line of the source text, counted from 1", examples=[14])


class ProblemOut(BaseModel):
    """Problem details, RFC 9457."""

    type: str = Field(examples=["urn:arriero:error:invalid-definition"])
    title: str = Field(examples=["invalid workflow"])
    status: int = Field(examples=[422])
    detail: str
    errors: list[FieldProblem] = []


def response(status: int, name: str, title: str, detail: str, problems: tuple[Problem, ...] = ()) -> JSONResponse:
    """Return a problem document as a response."""
    errors = [
        FieldProblem(where=_cut(p.where), message=_cut(p.message), accepted=_cut(p.accepted), line=p.line)
        for p in problems[:MAX_PROBLEMS]
    ]
    detail = _cut(detail, _MAX_DETAIL)
    body = ProblemOut(type=f"urn:arriero:error:{name}", title=title, status=status, detail=detail, errors=errors)
    headers = {"Retry-After": "5"} if status in (429, 503) else None
    return AsciiResponse(body.model_dump(), status_code=status, media_type=MEDIA_TYPE, headers=headers)


def _cut(text: str, max_characters: int = _MAX_TEXT) -> str:
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


class AsciiResponse(JSONResponse):
    """A JSON response that can contain lone surrogates, which a problem may quote from the request."""

    def render(self, content: Any) -> bytes:
        """Return JSON in ASCII, with escapes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def of_error(status: int, error: Exception) -> JSONResponse:
    """Return the response for an error of Arriero."""
    name = "".join(f"-{c.lower()}" if c.isupper() else c for c in type(error).__name__).lstrip("-")
    if isinstance(error, InvalidInput):
        detail = "; ".join(_cut(str(problem)) for problem in error.problems[:MAX_PROBLEMS])
        return response(status, name, f"invalid {error.what}", detail, error.problems)
    if isinstance(error, NotFound) and error.where:
        return response(status, name, name.replace("-", " "), str(error), (Problem(error.where, str(error)),))
    return response(status, name, name.replace("-", " "), str(error))


def of_request(error: RequestValidationError) -> tuple[Problem, ...]:
    """Return the problems of a request that FastAPI or `bodies.of` has refused."""
    found = []
    for item in error.errors()[:MAX_PROBLEMS]:
        place = ".".join(str(part) for part in item["loc"])
        input_ = item.get("input")
        whole = item["type"] == "missing" or (item["type"] == "value_error" and isinstance(input_, dict | list))
        given = "" if whole else shown(input_)
        message, accepted = message_of(item["type"], item["msg"]), item.get("accepted", "")
        message = message if accepted or not given or message.startswith(given) else f"{given}: {message}"
        found.append(Problem(place, message, accepted))
    return tuple(found)


def message_of(kind: str, message: str) -> str:
    """Return an error of pydantic, by its type and message, without names of classes that only this code knows."""
    if kind in _NO_OBJECT:
        return "this must be an object with fields"
    return message.removeprefix("Value error, ")


def shown(value: Any) -> str:
    """Return a rejected value for a message, shortened; empty where it cannot be shown as it was given."""
    if isinstance(value, timedelta):
        return durations.show(value)
    plain = isinstance(value, str | int | float | list | dict | None)
    return reprlib.repr(value) if plain else ""


#: The content of a problem in the OpenAPI document.
CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}}


def documented(
    *statuses: int, others: Mapping[int | str, dict[str, Any]] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an operation for its OpenAPI document, together with `others`."""
    descriptions = {
        402: "A budget is used up; the problem names it, and says when it begins anew",
        404: "The resource does not exist",
        409: "The request conflicts with the current state of the resource",
        412: "The version of `If-Match` is not the current one",
        413: "The body is too large",
        415: "The media type of the body is not supported",
        403: "The caller may not do this",
        422: "The input is invalid; every problem is listed",
        429: "A limit of the key or namespace is reached; `Retry-After` says for how long",
        503: "A part of the service is unavailable",
    }
    answers: dict[int | str, dict[str, Any]] = {
        status: {"description": descriptions[status], "content": CONTENT} for status in (*statuses, 503)
    }
    return {**answers, **dict(others or {})}
