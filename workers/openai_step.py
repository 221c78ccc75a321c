"""
The execution of requests in the form of OpenAI's API: their validation, their translation, and the answer's form.

It serves `openai` steps, lines of batches and direct requests alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from app.inference.batches.endpoints import ENDPOINTS
from app.inference.openai import answers, embedding, reranking
from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.generation import place_of
from app.inference.openai.reranking import RerankingRequest
from app.inference.openai.responses import document as responses
from app.inference.openai.responses.request import ResponseChat, ResponsesRequest
from app.inference.requests import Generated, PriorityClass
from app.kernel import clock
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.state_machine.outcomes import Success, TokenUsage
from workers import embedding_step
from workers.engine import Engine, OnPiece, OnStop, Ticket, require_images
from workers.images import ImageReader
from workers.memory.assembly import AssembledPrompt

AnyRequest = ChatRequest | CompletionRequest | EmbeddingsRequest | RerankingRequest

#: By the field that only requests of this kind have, where the endpoint of a request is not known.
_KINDS: Mapping[str, type[AnyRequest]] = {
    "messages": ChatRequest,
    "prompt": CompletionRequest,
    "input": EmbeddingsRequest,
    "query": RerankingRequest,
}
#: Most problems in a message.
_MAX_PROBLEMS = 5


def parse(body: Any, model: str, endpoint: str | None = None) -> AnyRequest:
    """
    Return the request of a body, for a model; that of a response as the chat completion that answers it.

    Raises StepFailure when it is no request.
    """
    if not isinstance(body, dict):
        raise _invalid("the request is not an object")
    found = (kind for field, kind in _KINDS.items() if field in body)
    kind = next(found, None) if endpoint is None else ENDPOINTS[endpoint]
    if kind is None:
        raise _invalid(f"the request has none of {', '.join(_KINDS)}")
    try:
        request = kind.model_validate({**body, "model": model})
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]
        problems = (f"{'.'.join(map(str, place_of(one)))}: {one['msg'].removeprefix('Value error, ')}" for one in wrong)
        raise _invalid("; ".join(problem.removeprefix(": ") for problem in problems)) from None
    if not isinstance(request, ResponsesRequest):
        return request
    try:  # a line of a batch, whose response cannot be read by its id
        return request.model_copy(update={"store": False}).translated(())
    except ValueError as error:
        raise _invalid(str(error)) from None


def start(
    engine: Engine,
    request: ChatRequest | CompletionRequest,
    priority: str,
    on_piece: OnPiece | None,
    assembled: AssembledPrompt | None = None,
    images: ImageReader | None = None,
) -> Ticket:
    """
    Submit a request for text to the engine; `images` reads its images.

    Raises StepFailure when it can never be served.
    """
    translated = request.translated() if assembled is None else assembled.request
    if translated.images and images is not None:
        require_images(engine, translated)
        translated = images.read(translated)
    return engine.generate(replace(translated, priority=PriorityClass(priority)), on_piece=on_piece)


def success(
    request: ChatRequest | CompletionRequest,
    generated: Generated,
    run_id: UUID,
    created: int,
    assembled: AssembledPrompt | None = None,
) -> Success:
    """The outcome of a request for text."""
    usage = TokenUsage(
        generated.tokens_in,
        sum(text.tokens_out for text in (generated, *generated.alternatives)),
        generated.tokens_cached,
        generated.time_to_first,
        "tool_calls" if generated.tool_calls else generated.finish.value,
    )
    done = Success(answers.document(request, generated, str(run_id), created), usage)
    return done if assembled is None else assembled.success(done, generated)


def embed(request: EmbeddingsRequest, engine: Engine, priority: str, on_stop: OnStop, timeout: timedelta) -> Success:
    """The outcome of a request for embeddings. Raises StepFailure, and CancelledError when it was stopped."""
    translated = request.translated()
    found = embedding_step.embed(
        list(translated.texts),
        engine,
        on_stop=on_stop,
        timeout=timeout,
        task=translated.task,
        dimensions=translated.dimensions,
        long=translated.long_text.value,
        priority=PriorityClass(priority),
    )
    return Success(embedding.document(request, found.output, found.usage.tokens_in), found.usage)


def rerank(request: RerankingRequest, engine: Engine, priority: str, on_stop: OnStop, timeout: timedelta) -> Success:
    """The outcome of a request for scores. Raises StepFailure, and CancelledError when it was stopped."""
    seconds = timeout.total_seconds()
    try:
        found = engine.rerank(replace(request.translated(), priority=PriorityClass(priority)), seconds, on_stop)
    except TimeoutError:
        raise StepFailure(FailureReason.TIMEOUT, f"the documents were not scored within {seconds:g} s") from None
    return Success(reranking.document(request, found.scores, found.tokens_in), TokenUsage(found.tokens_in))


def execute(
    body: Any,
    model: str,
    engine: Engine,
    *,
    endpoint: str | None = None,
    run_id: UUID,
    priority: str,
    on_stop: OnStop,
    on_piece: OnPiece | None,
    watch: Callable[[Callable[[], int]], AbstractContextManager[None]],
    timeout: timedelta,
    assemble: Callable[[ChatRequest], AssembledPrompt],
    images: ImageReader | None = None,
) -> Success:
    """
    Do a request, and wait for its end. `watch` is given a function that returns the number of tokens written so far.
    `assemble` puts the prompt of a conversation together. Where its `endpoint` is not known, its kind follows from its
    fields.

    Raises StepFailure, and CancelledError when it was stopped.
    """
    request, created = parse(body, model, endpoint), int(clock.now().timestamp())
    if isinstance(request, EmbeddingsRequest):
        return embed(request, engine, priority, on_stop, timeout)
    if isinstance(request, RerankingRequest):
        return rerank(request, engine, priority, on_stop, timeout)
    assembled = assemble(request) if isinstance(request, ChatRequest) and request.is_assembled else None
    ticket = start(engine, request, priority, on_piece, assembled, images)
    on_stop(ticket.cancel)
    seconds = timeout.total_seconds()
    try:
        with watch(ticket.written):
            generated = ticket.result(timeout=seconds)
    except TimeoutError:
        ticket.cancel()
        raise StepFailure(FailureReason.TIMEOUT, f"the model did not finish within {seconds:g} s") from None
    done = success(request, generated, run_id, created, assembled)
    if endpoint is not None and isinstance(request, ResponseChat):
        of_response = ResponsesRequest.model_validate(request.response)
        return replace(done, output=responses.answered(of_response, str(run_id), done.output))
    return done


def _invalid(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)
