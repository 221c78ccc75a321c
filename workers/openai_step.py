"""
The execution of requests in the form of OpenAI's API: their validation, their translation, and the answer's form.

It serves `openai` steps and direct requests alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from app.inference.openai import answers, embedding, reranking
from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.generation import place_of
from app.inference.openai.reranking import RerankingRequest
from app.inference.requests import Generated, PriorityClass
from app.kernel import clock
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.state_machine.outcomes import Success, TokenUsage
from workers import embedding_step
from workers.engine import Engine, OnPiece, OnStop, Ticket

AnyRequest = ChatRequest | CompletionRequest | EmbeddingsRequest | RerankingRequest

#: By the field that only requests of this kind have.
_KINDS: Mapping[str, type[AnyRequest]] = {
    "messages": ChatRequest,
    "prompt": CompletionRequest,
    "input": EmbeddingsRequest,
    "query": RerankingRequest,
}
#: Most problems in a message.
_MAX_PROBLEMS = 5


def parse(body: Any, model: str) -> AnyRequest:
    """
    Return the request of a body, for a model.

    Raises StepFailure when it is no request.
    """
    if not isinstance(body, dict):
        raise _invalid("the request is not an object")
    kind = next((kind for field, kind in _KINDS.items() if field in body), None)
    if kind is None:
        raise _invalid(f"the request has none of {', '.join(_KINDS)}")
    try:
        return kind.model_validate({**body, "model": model})
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]
        problems = (f"{'.'.join(map(str, place_of(one)))}: {one['msg'].removeprefix('Value error, ')}" for one in found)
        raise _invalid("; ".join(problem.removeprefix(": ") for problem in problems)) from None


def start(engine: Engine, request: ChatRequest | CompletionRequest, priority: str, on_piece: OnPiece | None) -> Ticket:
    """Submit a request for text to the engine. Raises StepFailure when it can never be served."""
    return engine.generate(replace(request.translated(), priority=PriorityClass(priority)), on_piece=on_piece)


def success(request: ChatRequest | CompletionRequest, generated: Generated, run_id: UUID, created: int) -> Success:
    """The outcome of a request for text."""
    usage = TokenUsage(
        generated.tokens_in,
        sum(text.tokens_out for text in (generated, *generated.alternatives)),
        generated.tokens_cached,
        generated.time_to_first,
        "tool_calls" if generated.tool_calls else generated.finish.value,
    )
    return Success(answers.document(request, generated, str(run_id), created), usage)


def embed(request: EmbeddingsRequest, engine: Engine, on_stop: OnStop, timeout: timedelta) -> Success:
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
    )
    return Success(embedding.document(request, found.output, found.usage.tokens_in), found.usage)


def rerank(request: RerankingRequest, engine: Engine, on_stop: OnStop, timeout: timedelta) -> Success:
    """The outcome of a request for scores. Raises StepFailure, and CancelledError when it was stopped."""
    seconds = timeout.total_seconds()
    try:
        found = engine.rerank(request.translated(), seconds, on_stop)
    except TimeoutError:
        raise StepFailure(FailureReason.TIMEOUT, f"the documents were not scored within {seconds:g} s") from None
    return Success(reranking.document(request, found.scores, found.tokens_in), TokenUsage(found.tokens_in))


def execute(
    body: Any,
    model: str,
    engine: Engine,
    *,
    run_id: UUID,
    priority: str,
    on_stop: OnStop,
    on_piece: OnPiece | None,
    watch: Callable[[Callable[[], int]], AbstractContextManager[None]],
    timeout: timedelta,
) -> Success:
    """
    Do a request, and wait for its end. `watch` is given a function that returns the number of tokens written so far.

    Raises StepFailure, and CancelledError when it was stopped.
    """
    request, created = parse(body, model), int(clock.now().timestamp())
    if isinstance(request, EmbeddingsRequest):
        return embed(request, engine, on_stop, timeout)
    if isinstance(request, RerankingRequest):
        return rerank(request, engine, on_stop, timeout)
    ticket = start(engine, request, priority, on_piece)
    on_stop(ticket.cancel)
    seconds = timeout.total_seconds()
    try:
        with watch(ticket.written):
            generated = ticket.result(timeout=seconds)
    except TimeoutError:
        ticket.cancel()
        raise StepFailure(FailureReason.TIMEOUT, f"the model did not finish within {seconds:g} s") from None
    return success(request, generated, run_id, created)


def _invalid(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)
