"""The endpoints for text and vectors: chat completions, completions, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from app.access.callers import Caller, KeyScope
from app.api import bodies, threads
from app.api.callers import InjectedCaller, requires
from app.api.openai import errors
from app.api.openai.calls import RUN_HEADER, ModelCall
from app.api.openai.errors import OpenAIRoute
from app.api.openai.road import InjectedRoad, Road
from app.api.services import InjectedServices, Services
from app.catalog.model import Model
from app.inference.openai.chat import ChatRequest
from app.inference.openai.chunks import Chunks
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.generation import place_of
from app.inference.openai.reranking import RerankingRequest
from app.inference.requests import PriorityClass
from app.kernel.errors import InvalidInput, Problem

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[requires(KeyScope.SUBMIT)], route_class=OpenAIRoute)

M = TypeVar("M", bound=BaseModel)

#: Bytes of a body that is parsed on the event loop: parsing it takes less than a millisecond or two.
_SHORT = 32 * 1024
_STATUSES = (400, 404, 409, 413, 415, 429, 500, 503, 504)
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer in OpenAI's form, or with `stream` its chunks as server-sent events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
        "headers": {RUN_HEADER: {"schema": {"type": "string"}, "description": "The id of the run"}},
    },
    **errors.documented(*_STATUSES),
}


def _body(model: type[M]) -> Any:
    """Return a dependency that parses and validates the body; a long one on a thread."""

    async def validated(request: Request) -> M:
        raw = await request.body()
        try:
            data = (
                bodies.parse_json(raw) if len(raw) <= _SHORT else await threads.run_for_request(bodies.parse_json, raw)
            )
            return model.model_validate(data)
        except ValidationError as error:
            found = [{**one, "loc": place_of(one)} for one in error.errors(include_url=False)]
            raise RequestValidationError(found) from None

    return Depends(validated)


@router.post(
    "/chat/completions",
    summary="Chat completions",
    responses=_ANSWERS,
    openapi_extra=bodies.documented_as(ChatRequest),
)
async def chat_completions(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    body: Annotated[ChatRequest, _body(ChatRequest)],
) -> Response:
    """
    The model's answer to a conversation. The call is a run: `X-Arriero-Run` has its id.

    `service_tier` sets its class: `flex` and `batch` wait for idle slots. Unknown fields are ignored.
    """
    return await _generate(request, services, road, caller, body, "chat")


@router.post(
    "/completions",
    summary="Completions",
    responses=_ANSWERS,
    openapi_extra=bodies.documented_as(CompletionRequest),
)
async def completions(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    body: Annotated[CompletionRequest, _body(CompletionRequest)],
) -> Response:
    """The model's continuation of a prompt, without a chat template."""
    return await _generate(request, services, road, caller, body, "completion")


@router.post(
    "/embeddings",
    summary="Embeddings",
    responses=_ANSWERS,
    openapi_extra=bodies.documented_as(EmbeddingsRequest),
)
async def embeddings(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    body: Annotated[EmbeddingsRequest, _body(EmbeddingsRequest)],
) -> Response:
    """
    The embeddings of texts: vectors of length 1.

    A text that is longer than the model's context is refused; `long_text` can be `chunk` (the mean of its windows) or
    `truncate`. `task` adds the model's prefix for a `query` or a `document`.
    """
    call = ModelCall(services, road, caller, body, body.model, PriorityClass.INTERACTIVE)
    _require(call.model, lambda model: model.serves_embeddings, "serves no embeddings", services)
    return await call.answer(request)


@router.post(
    "/rerank",
    summary="Reranking",
    responses=_ANSWERS,
    openapi_extra=bodies.documented_as(RerankingRequest),
)
async def rerank(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    body: Annotated[RerankingRequest, _body(RerankingRequest)],
) -> Response:
    """
    The relevance of documents to a query, best first, by a reranking model.

    The form is that of Jina, Cohere and llama.cpp's server; OpenAI's API has none.
    """
    call = ModelCall(services, road, caller, body, body.model, PriorityClass.INTERACTIVE)
    wrong = "is no reranking model: its use_cases do not have rerank"
    _require(call.model, lambda model: "rerank" in model.use_cases, wrong, services)
    return await call.answer(request)


def _require(model: Model, is_able: Callable[[Model], bool], wrong: str, services: Services) -> None:
    """Raises InvalidInput, which names the models that are able, when this one is not."""
    if not is_able(model):
        able = ", ".join(one.name for one in services.catalog.models if is_able(one))
        problem = Problem("model", f"the model {model.name!r} {wrong}", able or "a model with this use case")
        raise InvalidInput([problem], "request")


async def _generate(
    request: Request,
    services: InjectedServices,
    road: Road,
    caller: Caller,
    body: ChatRequest | CompletionRequest,
    kind: str,
) -> Response:
    call = ModelCall(services, road, caller, body, body.model, body.priority)
    if not body.streamed:
        return await call.answer(request)
    echoed = body.prompt if isinstance(body, CompletionRequest) and body.echo else ""
    chunks = Chunks(
        kind, body.model, str(call.run_id), call.request.created, includes_usage=body.includes_usage, echoed=echoed
    )
    return await call.stream(chunks)
