"""The extraction of memories: what namespaces and conversations have chosen, its counts, and what was refused."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.files.file import parsed_id, shown_id
from app.kernel.errors import NotFound
from app.memory.conversations.conversation import CONVERSATION_PREFIX
from app.memory.memories import options
from app.memory.memories.cursors import ExtractionState
from app.memory.memories.gate import GateReason

router = ApiRouter(prefix="/v1/memories", tags=["memory"], dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)])

#: The prefix of the ids of refused memories.
REFUSED_PREFIX = "refused_"
_Conversation = Annotated[str, Path(description="the id of a conversation", max_length=100)]


class ExtractionIn(BaseModel):
    """Whether the messages of a namespace are read for memories."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"enabled": True, "model": "qwen3:4b"}]})

    enabled: bool | None = Field(description="null: as the setting `memories.extract` has it")
    model: str | None = Field(
        default=None, min_length=1, max_length=200, description="a model or a selector; null: setting memories.model"
    )


class ConversationExtractionIn(BaseModel):
    """Whether the messages of a conversation are read for memories."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"enabled": True}]})

    enabled: bool | None = Field(description="null: as its namespace has it")
    from_start: bool = Field(default=False, description="also what was said before")


class ExtractionOut(BaseModel):
    """What a namespace has chosen, what holds for it, and its counts."""

    namespace: str
    enabled: bool | None = Field(description="null: as the settings have it")
    model: str | None
    since: datetime | None = Field(description="messages from before are not read")
    effective: bool = Field(description="whether conversations without a choice of their own are read")
    effective_model: str
    conversations: int
    in_progress: int
    failing: int = Field(description="conversations whose last extraction failed; it is tried again")
    skipped: int = Field(description="parts that the model could not answer")
    runs: int
    proposed: int
    written: int
    tokens_in: int
    tokens_out: int


class ConversationExtractionOut(BaseModel):
    """How far a conversation was read for memories."""

    conversation: str
    enabled: bool | None
    last_message: int = Field(description="the place of the last known message")
    read_through: int = Field(description="messages up to this place were read")
    run: str | None = Field(description="the run that reads the next ones")
    failures: int
    error: str
    skipped: int
    proposed: int
    written: int
    tokens_in: int
    tokens_out: int


class RefusedOut(BaseModel):
    """A memory that a model proposed and that was not written."""

    id: str
    namespace: str
    user: str | None
    conversation: str
    run: str = Field(description="the run that proposed it; it was removed, because it had the texts of messages")
    kind: str
    text: str
    reason: GateReason
    detail: str
    created_at: datetime


class RefusedListOut(BaseModel):
    """Refused memories, the newest first."""

    refused: list[RefusedOut]
    reasons: dict[str, int] = Field(description="all that are kept, counted by reason")
    has_more: bool
    last_id: str | None


@router.get("/extraction", summary="The extraction of memories", responses=problems.documented(422))
def extraction(services: InjectedServices, namespace: NamedNamespace) -> ExtractionOut:
    """Whether a namespace has its messages read, and what came of it."""
    chosen, totals = options.policy_of(services.database, namespace)
    settings = services.settings.memories
    return ExtractionOut(
        namespace=namespace,
        enabled=chosen.enabled,
        model=chosen.model,
        since=chosen.since,
        effective=settings.extract if chosen.enabled is None else chosen.enabled,
        effective_model=chosen.model or settings.model,
        **asdict(totals),
    )


@router.put(
    "/extraction",
    summary="Turn the extraction of memories on or off",
    dependencies=[requires(KeyScope.OPERATE)],
    responses=problems.documented(404, 422),
)
def set_extraction(
    services: InjectedServices, namespace: NamedNamespace, body: Annotated[ExtractionIn, bodies.of(ExtractionIn)]
) -> ExtractionOut:
    """
    Choose for a namespace. Messages from now on are read, in the background, by requests of the class `batch`.

    Each costs tokens of the model, which are counted for the namespace.
    """
    if body.model is not None and ":" not in body.model:
        services.catalog.get(body.model)  # a name without a tag is an error of typing
    options.set_policy(services.database, namespace, enabled=body.enabled, model=body.model)
    return extraction(services, namespace)


@router.get(
    "/extraction/{conversation_id}", summary="The extraction from a conversation", responses=problems.documented(404)
)
def of_conversation(
    conversation_id: _Conversation, services: InjectedServices, caller: InjectedCaller
) -> ConversationExtractionOut:
    """How far a conversation was read."""
    found = options.of_conversation(services.database, conversation_id, caller.namespace)
    return _of_conversation(conversation_id, found)


@router.put(
    "/extraction/{conversation_id}",
    summary="Turn the extraction from a conversation on or off",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=problems.documented(404, 422),
)
def set_conversation(
    conversation_id: _Conversation,
    services: InjectedServices,
    caller: InjectedCaller,
    body: Annotated[ConversationExtractionIn, bodies.of(ConversationExtractionIn)],
) -> ConversationExtractionOut:
    """Choose for one conversation, whatever its namespace has chosen."""
    found = options.set_conversation(
        services.database, conversation_id, caller.namespace, enabled=body.enabled, from_start=body.from_start
    )
    return _of_conversation(conversation_id, found)


@router.get("/refused", summary="Refused memories", responses=problems.documented(404, 422))
def refused(
    services: InjectedServices,
    namespace: ListedNamespace,
    reason: GateReason | None = None,
    after: Annotated[str | None, Query(max_length=100, description="the last id of the part before")] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> RefusedListOut:
    """What models proposed and the write gate refused, with the reasons. It is kept for `memories.keep_refused`."""
    last = None
    if after is not None and (last := parsed_id(after, REFUSED_PREFIX)) is None:
        raise NotFound("refused memory", after)
    found, counts = options.refused(
        services.database, namespace, reason=None if reason is None else reason.value, after=last, limit=limit + 1
    )
    shown = [_refused(one) for one in found[:limit]]
    return RefusedListOut(
        refused=shown, reasons=counts, has_more=len(found) > limit, last_id=shown[-1].id if shown else None
    )


def _refused(one: options.RefusedMemory) -> RefusedOut:
    return RefusedOut(
        id=shown_id(one.id, REFUSED_PREFIX),
        namespace=one.namespace,
        user=one.user,
        conversation=shown_id(one.conversation_id, CONVERSATION_PREFIX),
        run=str(one.run_id),
        kind=one.kind,
        text=one.text,
        reason=GateReason(one.reason),
        detail=one.detail,
        created_at=one.created_at,
    )


def _of_conversation(conversation_id: str, found: ExtractionState | None) -> ConversationExtractionOut:
    given: dict[str, Any] = {
        "enabled": None,
        "last_message": 0,
        "read_through": 0,
        "run": None,
        "error": "",
        **dict.fromkeys(("failures", "skipped", "proposed", "written", "tokens_in", "tokens_out"), 0),
    }
    if found is not None:
        state = asdict(found)
        given = {name: state.get(name) for name in given} | {
            "last_message": found.last_seq,
            "run": None if found.run_id is None else str(found.run_id),
        }
    return ConversationExtractionOut(conversation=conversation_id, **given)
