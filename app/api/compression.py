"""
Compression of a text or of messages.

The request is a run with one `compress` step: it is recorded, placed and counted like any other. The answer waits for
it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query, Request, Response
from pydantic import ConfigDict, Field, JsonValue, model_validator

from app.access.callers import Caller, KeyScope
from app.api import bodies, problems, threads
from app.api.admission import admit_submission
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.catalog.catalog import Catalog
from app.kernel.errors import ArrieroError, Conflict, FailureReason, InvalidInput, Problem, Unavailable
from app.memory.compression import messages
from app.memory.compression.messages import UnusableInput
from app.workflows.language import check
from app.workflows.language import definition as definitions
from app.workflows.language.compression import CompressionFields
from app.workflows.runs import views
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import FINAL_RUNS, RunState

router = ApiRouter(prefix="/v1", tags=["memory"])

#: The header with the id of the run.
RUN_HEADER = "X-Arriero-Run"
#: The step of the run.
_STEP = "compressed"
#: Seconds between two looks at the run: the first, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.03, 0.5
#: Most calls of this process that wait for their run; each polls the database.
MAX_WAITING = 100


class CompressIn(CompressionFields):
    """A text or messages, and the target of their compression."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"model": "smollm2:135m", "text": "A long text …", "target_ratio": 2}]},
    )

    text: str | None = Field(default=None, description="either this or `messages`")
    messages: list[dict[str, JsonValue]] | None = Field(
        default=None, description="objects with `role` and `content`, and `speaker` and `at` if they are known"
    )
    query: str = Field(default="", max_length=10_000, description="what the result is for")

    @model_validator(mode="after")
    def _has_one_input(self) -> CompressIn:
        if (self.text is None) == (self.messages is None):
            raise ValueError("exactly one of 'text' and 'messages' is required")
        try:
            messages.given(self.text if self.text is not None else self.messages, self.keep_recent)
        except UnusableInput as error:
            raise ValueError(f"{'text' if self.text is not None else 'messages'}{error}") from None
        return self


@router.post(
    "/compress",
    summary="Compress a text or messages",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=problems.documented(
        409,
        413,
        415,
        422,
        429,
        others={
            200: {
                "description": "The `text` or the `messages`, and what was done",
                "content": {"application/json": {"schema": {"type": "object"}}},
                "headers": {RUN_HEADER: {"schema": {"type": "string"}, "description": "The id of the run"}},
            },
            202: {"description": "The run, which has not ended within `wait` seconds"},
        },
    ),
    openapi_extra=bodies.documented_as(CompressIn),
)
async def compress(
    request: Request,
    services: InjectedServices,
    caller: InjectedCaller,
    body: Annotated[CompressIn, bodies.of(CompressIn)],
    wait: Annotated[float, Query(ge=0, le=600, description="seconds to wait for the result")] = 60,
) -> Response:
    """
    Fewer tokens, counted by the tokenizer of `model`: duplicates, what has nothing to do with `query`, and words that
    say little are left out; numbers, names, code, quotes, URLs and negations are never cut within a kept sentence.

    `target_met` is false, with the `reason`, if the target could not be reached. The call is a run, whose id is in
    `X-Arriero-Run`; a client that goes away cancels it.
    """
    submission = Submission(
        _definition(body, services.catalog),
        {"of": body.text if body.text is not None else body.messages, "query": body.query},
        priority="interactive",
        labels=caller.labels({}),
    )
    namespace = caller.namespace_of(submission.labels)
    waiting: WaitingCalls = request.app.state.compressions
    with waiting.one():
        return await _answer(request, services, caller, submission, namespace, wait)


async def _answer(
    request: Request, services: Services, caller: Caller, submission: Submission, namespace: str, wait: float
) -> Response:
    limits = await threads.run_for_request(admit_submission, services, caller, namespace)
    accepted = await threads.run_for_request(services.runs.submit, submission)
    headers = {RUN_HEADER: str(accepted.id), **limits}
    gone = asyncio.ensure_future(_gone(request))
    try:
        state, pause, until = RunState.RUNNING, _FIRST_PAUSE, asyncio.get_running_loop().time() + wait
        while (state := await threads.run_for_stream(_state, services, accepted.id)) not in FINAL_RUNS:
            if asyncio.get_running_loop().time() >= until:
                content = json.dumps({"run": str(accepted.id), "state": state.value})
                return Response(content, 202, headers, "application/json")
            done, _ = await asyncio.wait({gone}, timeout=pause)
            if done:
                await threads.run_for_request(services.runs.cancel, accepted.id, message="the client has gone away")
                return Response(status_code=400)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
    finally:
        gone.cancel()
    text = await threads.run_for_request(_result, services, accepted.id, state)
    return Response(text, 200, headers, "application/json")


def _definition(body: CompressIn, catalog: Catalog) -> definitions.Definition:
    """Return the workflow of a request. Raises InvalidInput for a model that the catalogue does not have."""
    found = list(check.compression_problems(body, "", catalog))
    if found:
        raise InvalidInput(found, "request")
    given = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
    fields = {name: value for name, value in given.items() if name in CompressionFields.model_fields}
    step: Mapping[str, Any] = {
        **fields,
        "id": _STEP,
        "kind": "compress",
        "input": "inputs.of",
        **({"query": "{{ inputs.query }}"} if body.query else {}),
    }
    return definitions.from_document({"workflow": "compress", "inputs": {"of": {}, "query": {}}, "steps": [step]})


def _state(services: Services, run_id: UUID) -> RunState:
    return RunState(views.run(services.database, run_id, 0).run.state)


def _result(services: Services, run_id: UUID, state: RunState) -> str:
    """Return the output of the run as JSON. Raises the error that tells why there is none."""
    if state is RunState.SUCCEEDED:
        return "".join(views.text_of(services.database, run_id, "output", _STEP))
    view = views.run(services.database, run_id, 0)
    error = next((step.error for step in view.steps if step.error), None) or view.run.error or {}
    message = str(error.get("message", f"run {run_id} was {state.value}"))
    match error.get("reason"):
        case FailureReason.INVALID_REQUEST:
            raise InvalidInput([Problem("", message)], "request")
        case FailureReason.TIMEOUT | FailureReason.WORKER_LOST:
            raise Unavailable(message)
        case None:
            raise Conflict(message)
        case _:
            raise CompressionFailed(message)


class TooManyWaiting(ArrieroError):
    """More calls wait for their compression than one process answers."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit} calls wait for their compression, and no more are accepted; send this one again later, or submit "
            "a run with a 'compress' step"
        )


class WaitingCalls:
    """The calls of this process that wait for their compression."""

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self._limit, self._calls = limit, 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count a call while it waits. Raises TooManyWaiting."""
        if self._calls >= self._limit:
            raise TooManyWaiting(self._limit)
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1


class CompressionFailed(ArrieroError):
    """The run of a compression failed."""


async def _gone(request: Request) -> None:
    """Wait until the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
