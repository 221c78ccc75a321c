"""The endpoints for text and vectors: chat completions, completions, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from app.access.callers import Caller, KeyScope
from app.api import bodies, threads
from app.api.callers import InjectedCaller, requires
from app.api.openai import continuation, errors, images
from app.api.openai.calls import CACHE_HEADER, RUN_HEADER, ModelCall
from app.api.openai.errors import OpenAIRoute
from app.api.openai.fallback import MODEL_HEADER, REASON_HEADER
from app.api.openai.options import CallOptions, InjectedOptions
from app.api.openai.road import InjectedRoad, Road
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.catalog.model import Model
from app.inference.cache.policy import CacheStatus
from app.inference.openai.chat import ChatRequest
from app.inference.openai.chunks import Chunks
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.generation import place_of
from app.inference.openai.reranking import RerankingRequest
from app.inference.requests import PriorityClass
from app.kernel.errors import InvalidInput, Problem

router = ApiRouter(prefix="/v1", tags=["openai"], dependencies=[requires(KeyScope.SUBMIT)], route_class=OpenAIRoute)

M = TypeVar("M", bound=BaseModel)

#: Bytes of a body that is parsed on the event loop: parsing it takes less than a millisecond or two.
_SHORT = 32 * 1024
_STATUSES = (400, 402, 404, 409, 413, 415, 429, 500, 503, 504)
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer in OpenAI's form, or with `stream` its chunks as server-sent events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
        "headers": {
            RUN_HEADER: {"schema": {"type": "string"}, "description": "The id of the run"},
            CACHE_HEADER: {
                "schema": {"enum": [status.value for status in CacheStatus]},
                "description": "What the response cache did; with `hit` and `near`, `Age` has the seconds",
            },
            MODEL_HEADER: {"schema": {"type": "string"}, "description": "The model that answers"},
            REASON_HEADER: {
                "schema": {"type": "string"},
                "description": "Why that one, for an alias, a selector or a fallback",
            },
        },
    },
    **errors.documented(*_STATUSES),
}


def body_of(model: type[M]) -> Any:
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
    options: InjectedOptions,
    body: Annotated[ChatRequest, body_of(ChatRequest)],
) -> Response:
    """
    The model's answer to a conversation. The call is a run: `X-Arriero-Run` has its id.

    `service_tier` sets its class: `flex` and `batch` wait for idle slots. Unknown fields are ignored. With
    `conversation_id` the messages continue that conversation: its record goes before them, and they and the answer are
    appended to it.
    """
    await continuation.require(services, caller, body.conversation_id, body.user, "conversation_id")
    body = await images.accepted(services, caller, body)
    return await _generate(request, services, road, caller, options, body, "chat")


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
    options: InjectedOptions,
    body: Annotated[CompletionRequest, body_of(CompletionRequest)],
) -> Response:
    """The model's continuation of a prompt, without a chat template."""
    return await _generate(request, services, road, caller, options, body, "completion")


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
    options: InjectedOptions,
    body: Annotated[EmbeddingsRequest, body_of(EmbeddingsRequest)],
) -> Response:
    """
    The embeddings of texts: vectors of length 1.

    A text that is longer than the model's context is refused; `long_text` can be `chunk` (the mean of its windows) or
    `truncate`. `task` adds the model's prefix for a `query` or a `document`.
    """
    call = ModelCall(services, road, caller, body, body.model, PriorityClass.INTERACTIVE, options)
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
    options: InjectedOptions,
    body: Annotated[RerankingRequest, body_of(RerankingRequest)],
) -> Response:
    """
    The relevance of documents to a query, best first, by a reranking model.

    The form is that of Jina, Cohere and llama.cpp's server; OpenAI's API has none.
    """
    call = ModelCall(services, road, caller, body, body.model, PriorityClass.INTERACTIVE, options)
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
    options: CallOptions,
    body: ChatRequest | CompletionRequest,
    kind: str,
) -> Response:
    call = ModelCall(services, road, caller, body, body.model, body.priority, options)
    if isinstance(body, ChatRequest):
        images.require_reader(services, call.model, body)
    if not body.streamed:
        return await call.answer(request)
    echoed = body.prompt if isinstance(body, CompletionRequest) and body.echo else ""
    chunks = Chunks(
        kind, body.model, str(call.run_id), call.request.created, includes_usage=body.includes_usage, echoed=echoed
    )
    return await call.stream(chunks)
