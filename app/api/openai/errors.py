"""
Errors in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`.

Endpoints of this form raise the errors of Arriero like all others; their route class translates them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from app.access.callers import NotAllowed, NotAuthenticated
from app.api import callers, problems
from app.kernel.errors import ArrieroError, FailureReason, InvalidInput, NotFound, Problem, Unavailable

#: By the reason of a failure, its status and code. Others are the server's fault.
_FAILURES: Mapping[str, tuple[int, str | None]] = {
    FailureReason.INVALID_REQUEST: (400, None),
    FailureReason.TEMPLATE_ERROR: (400, None),
    FailureReason.CONTEXT_EXCEEDED: (400, "context_length_exceeded"),
    FailureReason.TIMEOUT: (504, "timeout"),
    FailureReason.CANCELLED: (409, "cancelled"),
    FailureReason.WORKER_LOST: (503, "worker_lost"),
    FailureReason.WORKER_STOPPED: (503, "worker_stopped"),
}


#: The content of an error in the OpenAPI document.
CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIErrorOut"}}}


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="the field that is wrong", examples=["messages"])
    code: str | None = Field(examples=["model_not_found"])


class OpenAIErrorOut(BaseModel):
    """An error in the form of OpenAI's API."""

    error: ErrorDetail


class ModelNotFound(NotFound):
    """The catalogue has no such model."""


class TooManyCalls(ArrieroError):
    """More calls at a time than one process answers."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} calls are being answered, and no more are accepted; send this one again later")


class RequestFailed(ArrieroError):
    """A request failed in a pool."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def document(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error document."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return OpenAIErrorOut(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump()


def of_failure(reason: str, message: str) -> tuple[int, dict[str, Any]]:
    """Return status and document of a failure in a pool."""
    status, code = _FAILURES.get(reason, (500, reason or None))
    return status, document(message, status, code=code)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an operation for its OpenAPI document."""
    descriptions = {
        400: "The request is invalid",
        404: "The catalogue has no such model",
        409: "The run was cancelled",
        413: "The body is too large",
        415: "The media type of the body is not supported",
        429: "Too many requests wait",
        500: "The request failed in its pool",
        503: "A part of the service is unavailable, or the pool died",
        504: "The model did not finish in time",
    }
    return {status: {"description": descriptions[status], "model": OpenAIErrorOut} for status in statuses}


class OpenAIRoute(APIRoute):
    """A route whose errors have the form of OpenAI's API."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _response(400, _first(problems.of_request(error)))
            except HTTPException as error:
                return _response(error.status_code, document(str(error.detail), error.status_code))
            except NotAuthenticated as error:
                return callers.challenged(_response(401, document(str(error), 401, code="invalid_api_key")), error)
            except NotAllowed as error:
                return callers.challenged(_response(403, document(str(error), 403, code="insufficient_scope")), error)
            except RequestFailed as error:
                return _response(*of_failure(error.reason, str(error)))
            except ModelNotFound as error:
                return _response(404, document(str(error), 404, "model", "model_not_found"))
            except InvalidInput as error:
                return _response(400, _first(error.problems))
            except TooManyCalls as error:
                return _response(429, document(str(error), 429, code="rate_limit_exceeded"))
            except Unavailable as error:
                return _response(503, document(str(error), 503))

        return handled


def _first(found: tuple[Problem, ...]) -> dict[str, Any]:
    """Return a document of the first problem; the message has all."""
    param = found[0].where if found else None
    return document("; ".join(str(problem) for problem in found[:20]), 400, param or None)


def _response(status: int, content: dict[str, Any]) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return problems.AsciiResponse(content, status_code=status, headers=headers)
