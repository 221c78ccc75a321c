"""Errors in the form of Ollama's API: `{"error": "…"}`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from app.access.callers import NotAllowed, NotAuthenticated
from app.access.limits.limits import LimitReached
from app.api import callers, problems
from app.api.admission import openai_headers, refusal_headers
from app.api.bodies import UnsupportedMediaType
from app.api.openai import errors
from app.api.openai.errors import DeadlineUnmet, ModelNotFound, RequestFailed, TooManyCalls
from app.kernel.errors import ArrieroError, BudgetUsedUp, InvalidInput, Unavailable

#: The content of an error in the OpenAPI document.
CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/OllamaErrorOut"}}}


class OllamaErrorOut(BaseModel):
    """An error in the form of Ollama's API."""

    error: str


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an operation for its OpenAPI document."""
    return {status: {**one, "model": OllamaErrorOut} for status, one in errors.documented(*statuses).items()}


def response(status: int, message: str) -> JSONResponse:
    """Return an error."""
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return problems.AsciiResponse(OllamaErrorOut(error=message).model_dump(), status_code=status, headers=headers)


def of_error(status: int, error: ArrieroError) -> JSONResponse:
    """Return the answer for an error that no endpoint has raised."""
    return response(status, _text(error.problems) if isinstance(error, InvalidInput) else str(error))


class OllamaRoute(APIRoute):
    """A route whose errors have the form of Ollama's API."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return response(400, _text(problems.of_request(error)))
            except HTTPException as error:
                return response(error.status_code, str(error.detail))
            except RequestFailed as error:
                return response(errors.of_failure(error.reason, str(error))[0], str(error))
            except ModelNotFound as error:
                return response(404, f"model not found: {error}")
            except NotAuthenticated as error:
                return callers.challenged(response(401, str(error)), error)
            except NotAllowed as error:
                return callers.challenged(response(403, str(error)), error)
            except UnsupportedMediaType as error:
                return response(415, str(error))
            except InvalidInput as error:
                return response(400, _text(error.problems))
            except LimitReached as error:
                answer = response(429, str(error))
                answer.headers.update({**openai_headers(error.standings), **refusal_headers(error)})
                return answer
            except BudgetUsedUp as error:
                return response(402, str(error))
            except DeadlineUnmet as error:
                answer = response(503, str(error))
                answer.headers["Retry-After"] = str(error.retry_after)
                return answer
            except (TooManyCalls, Unavailable) as error:
                return response(503, str(error))

        return handled


def _text(found: tuple[Any, ...]) -> str:
    return "; ".join(str(problem).removeprefix(": ") for problem in found[:20])
