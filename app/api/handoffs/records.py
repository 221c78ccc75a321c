"""The messages of hand-offs: submit, list, show, mend, and send again."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Header, Query
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.bodies import RawBody
from app.api.callers import InjectedCaller, requires
from app.api.handoffs.handoffs import HandoffName, InjectedHandoffs
from app.api.problems import FieldProblem
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.governance.tasks import HANDOFFS
from app.handoffs import store
from app.handoffs.connectors.connector import ReceivedRequest
from app.handoffs.record import HandoffMessage, MessageState
from app.kernel.broker import CONTROL_QUEUE

router = ApiRouter(prefix="/v1/handoffs/{name}/messages", tags=["hand-offs"], dependencies=[requires(KeyScope.READ)])

#: Seconds after which a wake-up is obsolete.
_EXPIRES = 10.0


class AcceptedMessageOut(BaseModel):
    """A message that is stored, and will be handed on."""

    id: UUID
    key: str = Field(description="by which it is known when it comes again")
    duplicate: bool = Field(description="it was known, and is not handed on again")


class StageOut(BaseModel):
    """What was done with a message."""

    stage: str = Field(description="authenticate, validate, transform, deliver, confirm, or resend")
    at: datetime
    detail: str


class HandoffMessageOut(BaseModel):
    """A message, and what came of it."""

    id: UUID
    handoff: str
    version: int
    key: str
    sender: str
    state: MessageState
    problems: list[FieldProblem]
    run_id: UUID | None
    sending: int = Field(description="how often it was sent")
    duplicates: int = Field(description="how often it came again")
    accuracy: float | None
    completeness: float | None
    timeliness: float | None
    received_at: datetime
    finished_at: datetime | None


class FullMessageOut(HandoffMessageOut):
    """A message with its content."""

    message: dict[str, Any]
    payload: dict[str, Any] | None = Field(description="what is delivered; null before it is known")
    stages: list[StageOut]


class HandoffMessageList(BaseModel):
    """A page of messages, the newest first."""

    messages: list[HandoffMessageOut]
    next_cursor: UUID | None = Field(description="the value of `cursor` for the next page; null on the last page")


class MendIn(BaseModel):
    """A message in the place of the one that came."""

    message: dict[str, Any]


def wake(services: Services) -> None:
    """Have a control worker send what waits. Its next pass does so anyway."""
    services.publisher.publish(HANDOFFS, (), queue=CONTROL_QUEUE, description="wake-up", expires=_EXPIRES)


@router.post(
    "",
    status_code=202,
    dependencies=[requires(KeyScope.SUBMIT)],
    summary="Submit a message",
    responses=problems.documented(404, 413, 422),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}},
)
def submit(
    name: HandoffName,
    services: InjectedServices,
    handoffs: InjectedHandoffs,
    raw: RawBody,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> AcceptedMessageOut:
    """Hand on a message: a JSON object. The same key, or without one the same message, is handed on once."""
    accepted = handoffs.submit(name, ReceivedRequest({}, raw), idempotency_key)
    wake(services)
    return AcceptedMessageOut.model_validate(accepted, from_attributes=True)


@router.get("", summary="List messages", responses=problems.documented(404, 422))
def page(
    name: HandoffName,
    services: InjectedServices,
    handoffs: InjectedHandoffs,
    state: Annotated[MessageState | None, Query(description="`invalid` and `failed` are those to mend")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the previous page")] = None,
) -> HandoffMessageList:
    """The messages of a hand-off, the newest first, without their contents."""
    handoffs.get(name)
    with services.database.work() as work:
        found = store.page(work, handoffs.namespace, name, state, cursor, limit + 1)
    more = found[limit - 1].id if len(found) > limit else None
    listed = [HandoffMessageOut.model_validate(one, from_attributes=True) for one in found[:limit]]
    return HandoffMessageList(messages=listed, next_cursor=more)


@router.get("/{message_id}", summary="One message", responses=problems.documented(404, 422))
def get(name: HandoffName, handoffs: InjectedHandoffs, message_id: UUID) -> FullMessageOut:
    """A message: its content, its stages, and what came of it."""
    return _out(handoffs.message(name, message_id))


@router.post(
    "/{message_id}/mend",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Mend a message",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(MendIn),
)
def mend(
    name: HandoffName,
    services: InjectedServices,
    handoffs: InjectedHandoffs,
    caller: InjectedCaller,
    message_id: UUID,
    body: Annotated[MendIn, bodies.of(MendIn)],
) -> FullMessageOut:
    """Send a message with another content, which must be valid. It keeps its key: when it comes again, it is known."""
    sent = handoffs.resend(name, message_id, body.message, caller.name)
    wake(services)
    return _out(sent)


@router.post(
    "/{message_id}/replay",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Send a message again",
    responses=problems.documented(404, 409, 422),
)
def replay(
    name: HandoffName,
    services: InjectedServices,
    handoffs: InjectedHandoffs,
    caller: InjectedCaller,
    message_id: UUID,
) -> FullMessageOut:
    """Send a message again as it came, under the newest version. A target that upserts by a key has it once."""
    sent = handoffs.resend(name, message_id, None, caller.name)
    wake(services)
    return _out(sent)


def _out(found: HandoffMessage) -> FullMessageOut:
    return FullMessageOut.model_validate(found, from_attributes=True)
