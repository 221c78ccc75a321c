"""
Errors in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`.

Endpoints of this form raise the errors of Arriero like all others; their route class translates them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from app.access.callers import NotAllowed, NotAuthenticated
from app.access.limits.limits import LimitReached
from app.api import callers, problems
from app.api.admission import LoadShed, openai_headers, refusal_headers
from app.api.bodies import UnsupportedMediaType
from app.files.storage import FileTooLarge
from app.inference.openai import failures
from app.kernel.errors import ArrieroError, BudgetUsedUp, Conflict, InvalidInput, NotFound, Problem, Unavailable

#: Error documents, and those of failures in pools with their status.
document, of_failure = failures.error_document, failures.of_failure


#: The content of an error in the OpenAPI document.
CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIErrorOut"}}}
#: The code of a call that a model does not begin in time.
DEADLINE = "deadline_exceeded"


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


class ResponseNotFound(NotFound):
    """There is no such response."""


class PreviousResponseNotFound(ArrieroError):
    """There is no such response to continue."""

    def __init__(self, id_: str) -> None:
        super().__init__(f"Previous response with id {id_!r} not found.")


class TooManyCalls(ArrieroError):
    """More calls at a time than one process answers."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} calls are being answered, and no more are accepted; send this one again later")


class DeadlineUnmet(Unavailable):
    """No model begins to work on the call in time."""

    def __init__(self, message: str, retry_after: int) -> None:
        #: Seconds after which another try makes sense.
        self.retry_after = retry_after
        super().__init__(message)


class RequestFailed(ArrieroError):
    """A request failed in a pool."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an operation for its OpenAPI document."""
    descriptions = {
        400: "The request is invalid",
        402: "A budget is used up",
        404: "There is no such model, response, file or batch",
        409: "The run was cancelled, or the state does not allow this",
        413: "The body is too large",
        415: "The media type of the body is not supported",
        429: "A limit of the key or namespace is reached, or too many requests wait",
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
                return response(400, _first(problems.of_request(error)))
            except HTTPException as error:
                return response(error.status_code, document(str(error.detail), error.status_code))
            except NotAuthenticated as error:
                return callers.challenged(response(401, document(str(error), 401, code="invalid_api_key")), error)
            except NotAllowed as error:
                return callers.challenged(response(403, document(str(error), 403, code="insufficient_scope")), error)
            except RequestFailed as error:
                return response(*of_failure(error.reason, str(error)))
            except ModelNotFound as error:
                return response(404, document(str(error), 404, "model", "model_not_found"))
            except ResponseNotFound as error:
                return response(404, document(str(error), 404))
            except PreviousResponseNotFound as error:
                code = "previous_response_not_found"
                return response(400, document(str(error), 400, "previous_response_id", code))
            except UnsupportedMediaType as error:
                return of_error(415, error)
            except InvalidInput as error:
                return response(400, _first(error.problems))
            except LimitReached as error:
                return _limited(error)
            except BudgetUsedUp as error:
                return response(402, document(str(error), 402, code="insufficient_quota"))
            except TooManyCalls as error:
                return response(429, document(str(error), 429, code="rate_limit_exceeded"))
            except LoadShed as error:
                return response(503, document(str(error), 503, code="load_shed"), error.retry_after)
            except DeadlineUnmet as error:
                return response(503, document(str(error), 503, code=DEADLINE), error.retry_after)
            except NotFound as error:
                return response(404, document(str(error), 404, _field(error, request)))
            except FileTooLarge as error:
                return response(413, document(str(error), 413))
            except Conflict as error:
                return response(409, document(str(error), 409))
            except Unavailable as error:
                return response(503, document(str(error), 503))

        return handled


def of_error(status: int, error: ArrieroError) -> JSONResponse:
    """Return the answer for an error that no endpoint has raised."""
    if isinstance(error, InvalidInput):
        return response(status, _first(error.problems, status))
    return response(status, document(str(error), status))


def _first(found: tuple[Problem, ...], status: int = 400) -> dict[str, Any]:
    """Return a document of the first problem; the message has all."""
    param = found[0].where if found else None
    return document("; ".join(str(problem) for problem in found[:20]), status, param or None)


def _field(error: NotFound, request: Request) -> str | None:
    """The field of the request that names what is not there, or the parameter of its path."""
    named = (name for name, value in request.path_params.items() if str(value)[:100] == error.name)
    return error.where or next(named, None)


def _limited(error: LimitReached) -> JSONResponse:
    answer = response(429, document(str(error), 429, code="rate_limit_exceeded"))
    answer.headers.update({**openai_headers(error.standings), **refusal_headers(error)})
    return answer


def response(status: int, content: dict[str, Any], retry_after: int = 1) -> JSONResponse:
    """Return an error."""
    headers = {"Retry-After": str(retry_after)} if status in (429, 503) else None
    return problems.AsciiResponse(content, status_code=status, headers=headers)
