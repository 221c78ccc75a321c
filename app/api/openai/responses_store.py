"""
Stored responses: a response is a run, whose inputs have its request and the conversation that the model was given.

So a response that continues another one needs that one only, however long the chain is. A caller of one namespace finds
the responses of that namespace only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from app.access import namespaces
from app.access.callers import Caller
from app.api import threads
from app.api.openai import continuation
from app.api.openai.errors import PreviousResponseNotFound, ResponseNotFound
from app.api.openai.road import Road
from app.api.services import Services
from app.inference.direct import DirectRequest
from app.inference.openai.chat import MessageIn
from app.inference.openai.responses import document
from app.inference.openai.responses.document import ResponseStatus
from app.inference.openai.responses.request import ResponseChat, ResponsesRequest
from app.kernel.database import Database
from app.kernel.errors import FailureReason, InvalidInput, NotFound, Problem
from app.workflows.runs import views
from app.workflows.state_machine.states import FINAL_RUNS, RunState

#: Seconds for which a run that was answered may take to be recorded, and between two looks at it.
_RECORDED_WITHIN, _PAUSE = 10.0, 0.05


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as the database has it."""

    run_id: UUID
    request: ResponsesRequest
    #: The messages that the model was given.
    messages: tuple[MessageIn, ...]
    created: int
    state: RunState
    #: The chat completion that answers it.
    chat: Mapping[str, Any] | None
    #: The reason and the message of the failure.
    failure: tuple[str, str] | None
    model: str
    body: Mapping[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether it changes no more."""
        return self.state in FINAL_RUNS

    def document(self) -> dict[str, Any]:
        """The response in OpenAI's form."""
        if self.chat is not None:
            return document.answered(self.request, str(self.run_id), self.chat)
        if self.failure is not None:
            return document.failed(self.request, str(self.run_id), self.created, *self.failure)
        status = ResponseStatus.QUEUED if self.state == RunState.QUEUED else ResponseStatus.IN_PROGRESS
        return document.outline(self.request, str(self.run_id), self.created, status)

    def conversation(self) -> list[MessageIn]:
        """What a response that continues this one is given: all but the instructions, which hold for one response."""
        assert self.chat is not None, "only an answered response is continued"
        given = self.messages[1:] if self.request.instructions else self.messages
        message = self.chat["choices"][0]["message"]
        answer = MessageIn.model_validate({**message, "content": message["content"] or ""})
        return [*given, answer]

    def direct_request(self) -> DirectRequest:
        """The request of its run."""
        return DirectRequest(self.run_id, self.model, self.body, "", {}, self.created)


async def load(services: Services, road: Road, caller: Caller, id_: str) -> StoredResponse:
    """Return a response. Raises ResponseNotFound, also for one that was not to be stored."""
    run_id = document.run_id_of(id_)
    found = None if run_id is None else await _settled(services, road, UUID(run_id))
    if found is None or not found[0].request.is_stored or not _is_visible(caller, found[1]):
        raise ResponseNotFound("response", id_)
    return found[0]


async def conversation_before(services: Services, road: Road, caller: Caller, id_: str | None) -> list[MessageIn]:
    """
    Return the conversation that a response continues.

    Raises PreviousResponseNotFound, and InvalidInput for one without an answer.
    """
    if id_ is None:
        return []
    try:
        found = await load(services, road, caller, id_)
    except ResponseNotFound:
        raise PreviousResponseNotFound(id_) from None
    if found.chat is None:
        state = found.document()["status"]
        problem = Problem("previous_response_id", f"the response {id_} has no answer: it is {state}", "one that has")
        raise InvalidInput([problem], "request")
    if found.request.conversation is not None:
        return await continuation.messages_upto(services, caller, found.request.conversation.id, found.run_id)
    return found.conversation()


async def _settled(services: Services, road: Road, run_id: UUID) -> tuple[StoredResponse, Mapping[str, str]] | None:
    """A run with its labels. A run that has been answered, but is not recorded so yet, is awaited."""
    until = asyncio.get_running_loop().time() + _RECORDED_WITHIN
    while True:
        found = await threads.run_for_request(_read, services.database, run_id)
        if found is not None and found[0].has_ended:
            return found
        ended = await road.has_ended(run_id)
        awaited = ended if found is not None else ended is not None
        if not awaited or asyncio.get_running_loop().time() >= until:
            return found
        await asyncio.sleep(_PAUSE)


def _is_visible(caller: Caller, labels: Mapping[str, str]) -> bool:
    return caller.namespace in (None, labels.get(namespaces.LABEL, namespaces.DEFAULT))


def _read(database: Database, run_id: UUID) -> tuple[StoredResponse, Mapping[str, str]] | None:
    """The response of a run with its labels; None for a run that is none."""
    try:
        view = views.run(database, run_id)
    except NotFound:
        return None
    run, inputs = view.run, view.run.inputs
    if run.workflow != "openai" or not isinstance(inputs, dict) or len(view.steps) != 1:
        return None
    try:
        chat = ResponseChat.model_validate(inputs.get("request"))
        request = ResponsesRequest.model_validate(chat.response)
    except ValidationError:
        return None
    state, error = RunState(run.state), run.error or {}
    failure = None
    if state in FINAL_RUNS and state != RunState.SUCCEEDED:
        reason = FailureReason.CANCELLED if state == RunState.CANCELLED else error.get("reason", FailureReason.INTERNAL)
        failure = (str(reason), str(error.get("message", f"the run was {state}")))
    answer = view.steps[0].output if state == RunState.SUCCEEDED else None
    stored = StoredResponse(
        run_id,
        request,
        tuple(chat.messages),
        int(inputs.get("created", 0)),
        state,
        answer,
        failure,
        chat.model,
        inputs["request"],
    )
    return stored, run.labels
