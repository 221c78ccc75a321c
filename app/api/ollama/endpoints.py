"""The endpoints of Ollama's API for text and vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from app.access.callers import Caller, KeyScope
from app.api import bodies, problems, threads
from app.api.callers import InjectedCaller, requires
from app.api.ollama import calls, descriptions, errors, keep_alive, names
from app.api.ollama.calls import OllamaCall
from app.api.ollama.errors import OllamaRoute
from app.api.ollama.requests import OllamaChatIn, OllamaEmbeddingsIn, OllamaEmbedIn, OllamaGenerateIn, OllamaShowIn
from app.api.openai import images
from app.api.openai.calls import RUN_HEADER, ModelCall
from app.api.openai.road import InjectedRoad, Road
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.catalog.model import Model
from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.generation import place_of
from app.inference.requests import PriorityClass
from app.kernel.errors import InvalidInput, Problem

router = ApiRouter(prefix="/api", tags=["ollama"], dependencies=[requires(KeyScope.SUBMIT)], route_class=OllamaRoute)

M = TypeVar("M", bound=BaseModel)
_AnyIn = OllamaChatIn | OllamaGenerateIn | OllamaEmbedIn

#: Bytes of a body that is parsed on the event loop.
_SHORT = 32 * 1024
#: Most calls that load a model, and the seconds by which the pause between two of them grows.
_LOADS, _LOAD_PAUSE = 6, 0.1
_STATUSES = (400, 402, 404, 409, 413, 415, 429, 500, 503, 504)
_HEADERS = {RUN_HEADER: {"schema": {"type": "string"}, "description": "The id of the run"}}


def _answers(*media_types: str) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {one: {"schema": {"type": "object"}} for one in media_types}
    ok = {"description": "The answer in Ollama's form", "content": content, "headers": _HEADERS}
    return {200: ok, **errors.documented(*_STATUSES)}


def _body(model: type[M]) -> Any:
    """Return a dependency that parses and validates the body; a long one on a thread."""

    async def validated(request: Request) -> M:
        raw = await request.body()
        parse = bodies.parse_json
        data = parse(raw) if len(raw) <= _SHORT else await threads.run_for_request(parse, raw)
        return _validated(model, data)

    return Depends(validated)


@router.post(
    "/chat",
    summary="Chat, as in Ollama's API",
    responses=_answers("application/x-ndjson", "application/json"),
    openapi_extra=bodies.documented_as(OllamaChatIn),
)
async def chat(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    body: Annotated[OllamaChatIn, _body(OllamaChatIn)],
) -> Response:
    """
    The model's answer to a conversation, as JSON lines unless `stream` is false. The call is a run.

    Without messages the model is loaded, or with `keep_alive` 0 unloaded.
    """
    return await _generate(request, services, road, caller, body, "chat")


@router.post(
    "/generate",
    summary="Text, as in Ollama's API",
    responses=_answers("application/x-ndjson", "application/json"),
    openapi_extra=bodies.documented_as(OllamaGenerateIn),
)
async def generate(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    body: Annotated[OllamaGenerateIn, _body(OllamaGenerateIn)],
) -> Response:
    """
    The model's answer to a prompt, as JSON lines unless `stream` is false. With `raw` it continues the prompt.

    Without a prompt the model is loaded, or with `keep_alive` 0 unloaded.
    """
    return await _generate(request, services, road, caller, body, "generate")


@router.post(
    "/embed",
    summary="Embeddings, as in Ollama's API",
    responses=_answers("application/json"),
    openapi_extra=bodies.documented_as(OllamaEmbedIn),
)
async def embed(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    body: Annotated[OllamaEmbedIn, _body(OllamaEmbedIn)],
) -> Response:
    """The embeddings of texts. A text over the context is truncated, unless `truncate` is false."""
    found = await calls.until_left(request, _embedded(services, road, caller, body))
    return calls.left() if found is None else problems.AsciiResponse(found)


@router.post(
    "/embeddings",
    summary="An embedding, in the older form of Ollama's API",
    responses=_answers("application/json"),
    openapi_extra=bodies.documented_as(OllamaEmbeddingsIn),
)
async def embeddings(
    request: Request,
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    body: Annotated[OllamaEmbeddingsIn, _body(OllamaEmbeddingsIn)],
) -> Response:
    """The embedding of one text."""
    found = await calls.until_left(request, _embedded(services, road, caller, body.embed()))
    if found is None:
        return calls.left()
    vectors = found["embeddings"]
    return problems.AsciiResponse({"embedding": vectors[0] if vectors else []})


async def _generate(
    request: Request,
    services: Services,
    road: Road,
    caller: Caller,
    body: OllamaChatIn | OllamaGenerateIn,
    kind: str,
) -> Response:
    name, model = _named(services, road, caller, body)
    if not (body.only_loads or descriptions.writes(model)):
        raise _unable(body.model, "generate")
    if isinstance(body, OllamaChatIn) and body.tools:
        await _require_tools(services, body.model, model)
    if body.only_loads:
        loaded = await calls.until_left(request, _load(services, road, caller, body, name, model, kind))
        return calls.left() if loaded is None else problems.AsciiResponse(loaded)
    try:
        content = body.translated(name, model.context)
    except ValueError as error:
        raise InvalidInput([Problem("options", str(error))], "request") from None
    translated = _validated(CompletionRequest if "prompt" in content else ChatRequest, content)
    if isinstance(translated, ChatRequest):
        translated = await images.accepted(services, caller, translated)
    made = ModelCall(services, road, caller, translated, name, PriorityClass.INTERACTIVE)
    if isinstance(translated, ChatRequest):
        images.require_reader(services, made.model, translated)
    call = OllamaCall(made, body.model, kind, _at_end(services, caller, model, body))
    return await (call.stream() if body.streamed else call.answer(request))


async def _embedded(services: Services, road: Road, caller: Caller, body: OllamaEmbedIn) -> dict[str, Any]:
    name, model = _named(services, road, caller, body)
    if "embed" not in model.use_cases:
        raise _unable(body.model, "embeddings")
    if body.only_loads:
        await _load(services, road, caller, body, name, model, "embed")
        return {"model": body.model, "embeddings": []}
    translated = _validated(EmbeddingsRequest, body.translated(name))
    made = ModelCall(services, road, caller, translated, name, PriorityClass.INTERACTIVE)
    call = OllamaCall(made, body.model, "embed", _at_end(services, caller, model, body))
    document = await call.document()
    return {
        "model": body.model,
        "embeddings": [one["embedding"] for one in document["data"]],
        **call.durations(),
        "prompt_eval_count": document["usage"]["prompt_tokens"],
    }


async def _load(
    services: Services, road: Road, caller: Caller, body: _AnyIn, name: str, model: Model, kind: str
) -> dict[str, Any]:
    """Load a model by a call of one token, or unload it. Returns the answer."""
    at_end = _at_end(services, caller, model, body)
    to_unload = body.keep_alive is not None and not body.keep_alive
    unloads = to_unload and _may_change(caller) and not await keep_alive.is_kept(services, model)
    if to_unload or await keep_alive.is_loaded(services, model):
        await at_end()
    else:
        shortest: BaseModel = CompletionRequest(model=name, prompt=".", max_tokens=1)
        if not descriptions.writes(model):
            shortest = EmbeddingsRequest(model=name, input=["."])
        for attempt in range(_LOADS):
            made = ModelCall(services, road, caller, shortest, name, PriorityClass.INTERACTIVE)
            await OllamaCall(made, body.model, kind, at_end).document()
            if await keep_alive.is_coming(services, model):
                break
            # A pool that is being unloaded answered; it takes no more calls in a moment.
            await asyncio.sleep(_LOAD_PAUSE * attempt)
    text = {"response": ""} if kind == "generate" else {"message": {"role": "assistant", "content": ""}}
    return {**calls.heading(body.model), **text, "done": True, "done_reason": "unload" if unloads else "load"}


def _named(services: Services, road: Road, caller: Caller, body: _AnyIn) -> tuple[str, Model]:
    """The name and the entry of the model that a request means. Raises ModelNotFound."""
    name = names.resolve(services.catalog, body.model)
    return name, ModelCall(services, road, caller, OllamaShowIn(model=name), name, PriorityClass.INTERACTIVE).model


def _at_end(services: Services, caller: Caller, model: Model, body: _AnyIn) -> Callable[[], Coroutine[Any, Any, None]]:
    """What is done when a call has succeeded: `keep_alive`, of a caller that may change what others rely on."""

    async def apply() -> None:
        await keep_alive.apply(services, model, body.keep_alive if _may_change(caller) else None)

    return apply


def _may_change(caller: Caller) -> bool:
    """Whether a caller may change for how long a model that all namespaces use is loaded."""
    return KeyScope.OPERATE in caller.scopes and caller.namespace is None


async def _require_tools(services: Services, name: str, model: Model) -> None:
    """Raises InvalidInput for a model whose template is known and has no tools."""
    capabilities = await threads.run_for_request(descriptions.capabilities, services, model)
    if capabilities is not None and "tools" not in capabilities:
        raise _unable(name, "tools: its chat template has none (an entry of the catalogue can set prompt.tools)")


def _validated(model: type[M], data: Any) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [{**one, "loc": place_of(one)} for one in error.errors(include_url=False)]
        raise RequestValidationError(found) from None


def _unable(name: str, what: str) -> InvalidInput:
    return InvalidInput([Problem("model", f"{name!r} does not support {what}")], "request")
