"""The resource `conversations` in OpenAI's form, and what that form lacks: lists, forks, exports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Query
from fastapi.responses import StreamingResponse

from app.access import namespaces
from app.access.callers import KeyScope
from app.api import bodies, threads
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.memory.documents import (
    ConversationForkIn,
    ConversationListOut,
    ConversationOut,
    ConversationPatch,
    NewConversationIn,
    out,
)
from app.api.memory.parts import Conversing, message_at
from app.api.openai import errors
from app.api.openai.errors import OpenAIRoute
from app.api.routers import ApiRouter
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.memory.conversations import export, items
from app.memory.conversations.conversation import NewConversation, StoredConversation
from app.memory.conversations.export import ExportFormat
from app.memory.conversations.lists import ConversationFilter
from app.memory.conversations.service import Conversations, parsed_conversation

PATH = "/v1/conversations"

router = ApiRouter(
    prefix=PATH,
    tags=["openai"],
    dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)],
    route_class=OpenAIRoute,
)

#: Messages that an export reads at a time.
_PART = 200
_TYPES = {ExportFormat.JSONL: "application/x-ndjson", ExportFormat.MARKDOWN: "text/markdown; charset=utf-8"}


@router.post(
    "",
    summary="Create a conversation",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=errors.documented(400, 413, 415, 503),
    openapi_extra=bodies.documented_as(NewConversationIn),
)
def create(
    conversing: Conversing,
    namespace: ListedNamespace,
    body: Annotated[NewConversationIn, bodies.of(NewConversationIn)],
) -> ConversationOut:
    """Create a conversation, with its first items if there are some."""
    new = NewConversation(
        namespace or namespaces.DEFAULT, body.user, body.title, body.metadata or {}, body.model, body.retention
    )
    messages = [message for item in body.items or () if (message := items.message_of(item)) is not None]
    return out(conversing.conversations.create(new, messages))


@router.get("", summary="List conversations", responses=errors.documented(400, 404, 503))
def page(
    conversing: Conversing,
    namespace: ListedNamespace,
    user: Annotated[str | None, Query(max_length=200)] = None,
    metadata: Annotated[
        list[str] | None, Query(max_length=16, description="`key:value`; each must be there", examples=[["topic:tea"]])
    ] = None,
    title: Annotated[str | None, Query(max_length=500, description="a part of the title")] = None,
    since: Annotated[datetime | None, Query(description="created at or after this time")] = None,
    until: Annotated[datetime | None, Query(description="created before this time")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="the id of the last one of the part before")] = None,
    order: Literal["asc", "desc"] = "desc",
) -> ConversationListOut:
    """The conversations, the newest first."""
    last = None
    if after is not None and (last := parsed_conversation(after)) is None:
        raise NotFound("conversation", after[:100], where="after")
    wanted = ConversationFilter(namespace, user, _pairs(metadata or ()), title, _aware(since), _aware(until))
    found = conversing.conversations.page(wanted, after=last, limit=limit, newest_first=order == "desc")
    data = [out(one) for one in found.conversations]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return ConversationListOut(data=data, first_id=first_id, last_id=last_id, has_more=found.has_more)


@router.get("/{conversation_id}", summary="A conversation", responses=errors.documented(404, 503))
def get(conversation_id: str, conversing: Conversing, caller: InjectedCaller) -> ConversationOut:
    """A conversation, without its messages."""
    found = conversing.get(conversation_id, caller)
    return out(found, conversing.hot.counters(found))


@router.post(
    "/{conversation_id}",
    summary="Change a conversation",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=errors.documented(400, 404, 413, 415, 503),
    openapi_extra=bodies.documented_as(ConversationPatch),
)
def update(
    conversation_id: str,
    conversing: Conversing,
    caller: InjectedCaller,
    body: Annotated[ConversationPatch, bodies.of(ConversationPatch)],
) -> ConversationOut:
    """Change the metadata, the title, the model or the retention; what is not given stays."""
    id_ = parsed_conversation(conversation_id)
    return out(conversing.conversations.update(id_, caller.namespace, body.given(), conversation_id[:100]))


@router.post(
    "/{conversation_id}/fork",
    summary="Fork a conversation",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=errors.documented(400, 404, 413, 415, 503),
    openapi_extra=bodies.documented_as(ConversationForkIn),
)
def fork(
    conversation_id: str,
    conversing: Conversing,
    caller: InjectedCaller,
    body: Annotated[ConversationForkIn, bodies.of(ConversationForkIn)],
) -> ConversationOut:
    """Create a conversation with the messages of this one up to a message, or all of them. This one does not change."""
    found = conversing.get(conversation_id, caller)
    made = conversing.conversations.fork(
        found.id,
        caller.namespace,
        None if body.at is None else message_at(conversing.conversations, found, body.at, "at"),
        title=body.title,
        metadata=body.metadata,
        shown=conversation_id[:100],
    )
    return out(made)


@router.get(
    "/{conversation_id}/export",
    summary="Export a conversation",
    response_class=StreamingResponse,
    responses={
        200: {"description": "The messages", "content": {type_: {} for type_ in _TYPES.values()}},
        **errors.documented(400, 404, 503),
    },
)
async def export_(
    conversation_id: str,
    conversing: Conversing,
    caller: InjectedCaller,
    format: ExportFormat = ExportFormat.JSONL,  # noqa: A002 the name of the parameter
) -> StreamingResponse:
    """All messages as JSON Lines, which can be appended to another conversation, or as Markdown."""
    found = await threads.run_for_request(conversing.get, conversation_id, caller)
    name = f"{conversation_id}.{'jsonl' if format is ExportFormat.JSONL else 'md'}"
    headers = {
        # A browser must save it, and not show it as a page of this server.
        "Content-Disposition": f'attachment; filename="{name}"',
        "X-Content-Type-Options": "nosniff",
    }
    written = _written(conversing.conversations, found, format)
    return StreamingResponse(written, media_type=_TYPES[format], headers=headers)


async def _written(
    conversations: Conversations, conversation: StoredConversation, form: ExportFormat
) -> AsyncIterator[str]:
    yield export.head(conversation, form)
    first, end = 1, conversation.next_seq
    while found := await threads.run_for_stream(conversations.read, conversation.id, first=first, end=end, limit=_PART):
        yield export.lines(found, form)
        first = found[-1].seq + 1


def _pairs(given: Any) -> dict[str, str]:
    """Raises InvalidInput for what has no colon."""
    found = {}
    for place, one in enumerate(given):
        name, colon, value = one.partition(":")
        if not colon or len(one) > 600:
            problem = Problem(f"query.metadata[{place}]", f"{one[:100]!r} is no entry of metadata", "key:value")
            raise InvalidInput([problem], "request")
        found[name] = value
    return found


def _aware(instant: datetime | None) -> datetime | None:
    """Raises InvalidInput for an instant without a time zone."""
    if instant is not None and instant.tzinfo is None:
        problem = Problem("query.since", f"{instant.isoformat()} has no time zone", "such as 2026-11-22T10:00:00Z")
        raise InvalidInput([problem], "request")
    return instant
