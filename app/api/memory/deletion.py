"""Deletion for real: of a conversation, and of everything of a user, with the proof."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import redis
from fastapi import Path, Request
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems, threads
from app.api.cache.answers import Answers
from app.api.callers import InjectedCaller, NamedNamespace, requires
from app.api.memory.parts import Conversing
from app.api.openai import errors
from app.api.openai.errors import OpenAIRoute
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.memory.conversations.conversation import MAX_USER
from app.memory.deletion import Deletion, DeletionReport

#: Of conversations, in OpenAI's form; and of users.
conversations_router = ApiRouter(
    prefix="/v1/conversations",
    tags=["openai"],
    dependencies=[requires(KeyScope.SUBMIT)],
    route_class=OpenAIRoute,
)
users_router = ApiRouter(prefix="/v1/users", tags=["memory"], dependencies=[requires(KeyScope.OPERATE)])

_User = Annotated[str, Path(min_length=1, max_length=MAX_USER, description="as conversations name the user")]
#: The name of the response cache in reports.
_CACHE = "cached answers"


class DeletionProofOut(BaseModel):
    """What was deleted, and the result of a search in each store afterwards."""

    removed: Mapping[str, int] = Field(description="by store", examples=[{"messages": 12, "conversations": 1}])
    left: Mapping[str, int] = Field(description="what the search found, by store; all zero when everything is gone")
    proved: bool = Field(description="every store was searched, and nothing was found")
    notes: list[str] = Field(description="what goes later, or could not be searched")


class ConversationDeletedOut(DeletionProofOut):
    """A conversation that was deleted. All but `id`, `object` and `deleted` is Arriero's."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True


class UserDeletedOut(DeletionProofOut):
    """A user whose memory was deleted."""

    user: str
    namespace: str


class UserMemoryOut(BaseModel):
    """What is stored of a user."""

    user: str
    namespace: str
    stored: Mapping[str, int] = Field(description="by store")


@conversations_router.delete(
    "/{conversation_id}", summary="Delete a conversation", responses=errors.documented(404, 503)
)
def delete(
    conversation_id: str, services: InjectedServices, conversing: Conversing, caller: InjectedCaller
) -> ConversationDeletedOut:
    """
    Delete a conversation for real: messages, vectors, summaries, memories that came from it, runs that held its texts.

    The answer has what a search in each store finds afterwards.
    """
    found = conversing.get(conversation_id, caller)
    report = Deletion(services.runs, conversing.hot).conversation(found.namespace, found.id)
    return ConversationDeletedOut(id=conversation_id, **_proof(report))


@users_router.get(
    "/{user:path}/memory",
    summary="What is stored of a user",
    dependencies=[requires(KeyScope.READ)],
    responses=problems.documented(422),
)
def stored(user: _User, services: InjectedServices, conversing: Conversing, namespace: NamedNamespace) -> UserMemoryOut:
    """How much each store has of a user."""
    found = Deletion(services.runs, conversing.hot).left_of_user(namespace, user)
    return UserMemoryOut(user=user, namespace=namespace, stored=found)


@users_router.delete("/{user:path}/memory", summary="Delete everything of a user", responses=problems.documented(422))
async def delete_user(
    user: _User, request: Request, services: InjectedServices, conversing: Conversing, namespace: NamedNamespace
) -> UserDeletedOut:
    """
    Delete all of a user for real: conversations, memories, blocks, documents, and runs that held their texts.

    Cached answers do not say whose they are: those of the whole namespace are removed. The answer has what a search in
    each store finds afterwards. A user of whom nothing is stored is no error.
    """
    deletion = Deletion(services.runs, conversing.hot)
    report = await threads.run_for_request(deletion.user, namespace, user)
    answers: Answers = request.app.state.answers
    removed, left, notes = dict(report.removed), dict(report.left), list(report.notes)
    try:
        removed[_CACHE] = await answers.store.purge(namespace, None)
        left[_CACHE] = sum(one.entries for one in await answers.store.stats(namespace))
    except (redis.RedisError, OSError) as error:
        notes.append(f"cached answers were not removed, they expire: the broker is unreachable: {error}")
    return UserDeletedOut(user=user, namespace=namespace, **_proof(DeletionReport(removed, left, tuple(notes))))


def _proof(report: DeletionReport) -> dict[str, object]:
    return {
        "removed": {name: count for name, count in report.removed.items() if count},
        "left": report.left,
        "proved": report.is_proved,
        "notes": list(report.notes),
    }
