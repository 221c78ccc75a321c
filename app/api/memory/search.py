"""The search in conversations: messages by their words and their meaning."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, Field

from app.access import namespaces
from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.memory.parts import Conversing
from app.api.openai import errors
from app.api.openai.errors import OpenAIRoute
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.files.file import parsed_id
from app.memory.conversations.message import MESSAGE_PREFIX, MessageRole
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import MAX_QUERY, RecalledPassage, RecallQuery, RecallScope, SearchLeg

router = ApiRouter(
    prefix="/v1/conversations",
    tags=["openai"],
    dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)],
    route_class=OpenAIRoute,
)

_Text = Annotated[str, Query(min_length=1, max_length=MAX_QUERY, description="what is looked for")]
_Limit = Annotated[int, Query(ge=1, le=100)]
_Roles = Annotated[list[MessageRole] | None, Query(max_length=5, description="only messages of these roles")]
_Since = Annotated[datetime | None, Query(description="said at or after this time")]
_Until = Annotated[datetime | None, Query(description="said before this time")]


class FoundMessageOut(BaseModel):
    """A message that was found, or the part of it that matches."""

    conversation: str
    id: str
    seq: int
    role: str | None
    speaker: str | None
    text: str = Field(description="the part of the message that matches")
    created_at: int
    score: float = Field(description="compares results of one search only")
    matched: list[str] = Field(description="words of the query that it has, without their endings")


class LegOut(BaseModel):
    """Whether a way to search was used, and why not."""

    used: bool
    reason: str | None


class MessageSearchOut(BaseModel):
    """Messages, the best first, and how they were found."""

    object: Literal["list"] = "list"
    data: list[FoundMessageOut]
    lexical: LegOut
    dense: LegOut


@router.get("/search", summary="Search all conversations", responses=errors.documented(400, 503))
def search(
    services: InjectedServices,
    namespace: ListedNamespace,
    q: _Text,
    user: Annotated[str | None, Query(max_length=200, description="only conversations of this user")] = None,
    role: _Roles = None,
    since: _Since = None,
    until: _Until = None,
    limit: _Limit = 20,
) -> MessageSearchOut:
    """Messages of all conversations of a namespace, or of one user of it, the best first."""
    query = RecallQuery(
        q,
        namespace or namespaces.DEFAULT,
        user,
        scope=RecallScope.ALL if user is None else RecallScope.OWN,
        sources=(SourceKind.MESSAGE,),
        roles=tuple(role or ()),
        since=since,
        until=until,
        limit=limit,
    )
    return _found(services, query)


@router.get("/{conversation_id}/search", summary="Search a conversation", responses=errors.documented(400, 404, 503))
def search_one(
    conversation_id: str,
    services: InjectedServices,
    conversing: Conversing,
    caller: InjectedCaller,
    q: _Text,
    role: _Roles = None,
    since: _Since = None,
    until: _Until = None,
    limit: _Limit = 20,
) -> MessageSearchOut:
    """Messages of a conversation, the best first."""
    found = conversing.get(conversation_id, caller)
    query = RecallQuery(
        q,
        found.namespace,
        found.user,
        sources=(SourceKind.MESSAGE,),
        conversations=(conversation_id,),
        roles=tuple(role or ()),
        since=since,
        until=until,
        limit=limit,
    )
    return _found(services, query)


def _found(services: Services, query: RecallQuery) -> MessageSearchOut:
    found = services.recall.search(query)
    return MessageSearchOut(
        data=[_out(passage) for passage in found.passages], lexical=_leg(found.lexical), dense=_leg(found.dense)
    )


def _leg(leg: SearchLeg) -> LegOut:
    return LegOut(used=leg.used, reason=leg.reason)


def _out(passage: RecalledPassage) -> FoundMessageOut:
    assert passage.conversation is not None, "a message has a conversation"
    assert parsed_id(passage.source_id, MESSAGE_PREFIX) is not None, "its passages have its id"
    return FoundMessageOut(
        conversation=passage.conversation,
        id=passage.source_id,
        seq=passage.position,
        role=passage.role,
        speaker=passage.speaker,
        text=passage.text,
        created_at=int(passage.at.timestamp()),
        score=round(passage.score, 4),
        matched=list(passage.matched),
    )
