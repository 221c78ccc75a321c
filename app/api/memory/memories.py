"""The resource `memories`: what is remembered of users and namespaces, beyond one conversation."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request, Response
from pydantic import AwareDatetime

from app.access.audit import log as audit_log
from app.access.callers import Caller, KeyScope
from app.api import auditing, bodies, problems
from app.api.callers import InjectedCaller, ListedNamespace, NamedNamespace, requires
from app.api.memory.memory_documents import (
    BreakthroughIn,
    ForgetIn,
    ForgottenOut,
    InvalidationIn,
    MemoryEventOut,
    MemoryHistoryOut,
    MemoryIn,
    MemoryListOut,
    MemoryOut,
    RememberedOut,
    SuccessorIn,
    forgotten_out,
    memory_fields,
    memory_out,
)
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.files.file import parsed_id
from app.kernel.errors import NotFound
from app.memory.conversations.conversation import CONVERSATION_PREFIX
from app.memory.memories import forgetting, service
from app.memory.memories.kinds import MAX_USER, MemoryKind, MemoryOrigin
from app.memory.memories.memory import MemorySource, NewMemory
from app.memory.memories.service import shown
from app.memory.memories.store import MemoryFilter

router = ApiRouter(prefix="/v1/memories", tags=["memory"], dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)])

_Id = Annotated[
    str, Path(description="the id of a memory", examples=["mem_0199a3c2d6f47a0b8c1d2e3f4a5b6c7d"], max_length=100)
]
_WRITES = [requires(KeyScope.SUBMIT)]


@router.post("", summary="Remember something", dependencies=_WRITES, responses=problems.documented(404, 409, 422, 429))
def remember(
    response: Response,
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: NamedNamespace,
    body: Annotated[MemoryIn, bodies.of(MemoryIn)],
) -> RememberedOut:
    """
    Write a memory. One that holds, of the same user and with the same words, is returned instead (200, not 201).

    With `supersedes`, that memory ends where this one begins: a changed fact keeps its past.
    """
    sources = service.message_sources(services.database, body.messages, namespace)
    conversation_id = None
    if body.conversation is not None:
        conversation_id = service.require_conversation(services.database, body.conversation, namespace)
    new = NewMemory(
        body.text,
        body.kind,
        body.user,
        conversation_id,
        [*sources, _by_hand(caller)],
        body.valid_from,
        body.importance,
        body.confidence,
    )
    done = service.remember(services.database, new, namespace, caller.name, supersedes=body.supersedes, note=body.note)
    response.status_code = 201 if done.created else 200
    return RememberedOut(**memory_fields(done.memory), created=done.created)


@router.get("", summary="Memories", responses=problems.documented(404, 422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    user: Annotated[str | None, Query(max_length=MAX_USER)] = None,
    kind: MemoryKind | None = None,
    conversation: Annotated[str | None, Query(max_length=100, description="those that come from it")] = None,
    as_of: Annotated[AwareDatetime | None, Query(description="those that held at this instant")] = None,
    all_times: Annotated[bool, Query(alias="all", description="also those that hold no more")] = False,
    after: Annotated[str | None, Query(max_length=100, description="the last id of the part before")] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> MemoryListOut:
    """The memories that hold, the newest first."""
    conversation_id = None
    if conversation is not None and (conversation_id := parsed_id(conversation, CONVERSATION_PREFIX)) is None:
        raise NotFound("conversation", conversation, where="conversation")
    wanted = MemoryFilter(namespace, user, kind, conversation_id, as_of, all_times)
    found = service.page(services.database, wanted, after, limit)
    last = shown(found.memories[-1].id) if found.memories else None
    return MemoryListOut(memories=[memory_out(one) for one in found.memories], has_more=found.has_more, last_id=last)


@router.post("/forget", summary="Forget memories", dependencies=_WRITES, responses=problems.documented(404, 422))
def forget(
    request: Request,
    services: InjectedServices,
    namespace: NamedNamespace,
    caller: InjectedCaller,
    body: Annotated[ForgetIn, bodies.of(ForgetIn)],
) -> ForgottenOut:
    """
    Delete memories for real: their texts, sources, history, passages and vectors, and refusals that say the same.

    A search afterwards, in the same transaction, shows that nothing is left. Messages of conversations stay; delete
    the conversation to remove them.
    """
    # The audit log keeps neither the query nor a text of what was forgotten.
    said = {"ids": body.ids, "with_history": body.with_history, "user": body.user, "everything": body.everything}
    record = auditing.record_of(request, caller, said)
    if body.query is not None:
        found = forgetting.matching(services.database, body.query, namespace, body.user)
        return forgotten_out(None, found)
    if body.everything:
        assert body.user is not None, "the model requires it"
        done = forgetting.forget_user(services.database, namespace, body.user)
    else:
        done = forgetting.forget(services.database, body.ids, caller.namespace, with_history=body.with_history)
    audit_log.add_all(services.database, [record])
    return forgotten_out(done)


@router.get("/{memory_id}", summary="A memory", responses=problems.documented(404))
def get(memory_id: _Id, services: InjectedServices, caller: InjectedCaller) -> MemoryOut:
    """A memory, whether it holds or not."""
    return memory_out(service.get(services.database, memory_id, caller.namespace))


@router.get("/{memory_id}/history", summary="The history of a memory", responses=problems.documented(404))
def history(memory_id: _Id, services: InjectedServices, caller: InjectedCaller) -> MemoryHistoryOut:
    """What was true before and after: the memories that took each other's place, and what happened to them."""
    found = service.history(services.database, memory_id, caller.namespace)
    events = [
        MemoryEventOut(
            memory=shown(one.memory_id), event=one.event, at=one.at, author=one.author, note=one.note, detail=one.detail
        )
        for one in found.entries
    ]
    return MemoryHistoryOut(memories=[memory_out(one) for one in found.memories], events=events)


@router.post(
    "/{memory_id}/invalidate",
    summary="End a memory",
    dependencies=_WRITES,
    responses=problems.documented(404, 409, 422),
)
def invalidate(
    memory_id: _Id,
    services: InjectedServices,
    caller: InjectedCaller,
    body: Annotated[InvalidationIn, bodies.of(InvalidationIn)],
) -> MemoryOut:
    """It holds no more, since now or an earlier instant. Its text stays, for reads as of then."""
    return memory_out(
        service.invalidate(services.database, memory_id, caller.namespace, caller.name, at=body.at, note=body.note)
    )


@router.post(
    "/{memory_id}/supersede",
    summary="Replace a memory",
    dependencies=_WRITES,
    status_code=201,
    responses=problems.documented(404, 409, 422),
)
def supersede(
    memory_id: _Id,
    services: InjectedServices,
    caller: InjectedCaller,
    body: Annotated[SuccessorIn, bodies.of(SuccessorIn)],
) -> RememberedOut:
    """Another memory takes its place: what has changed, or was wrong."""
    old = service.get(services.database, memory_id, caller.namespace)
    sources = service.message_sources(services.database, body.messages, old.namespace)
    new = NewMemory(
        body.text,
        body.kind or MemoryKind(old.kind),
        old.user,
        old.conversation_id,
        [*sources, _by_hand(caller)],
        body.valid_from,
        old.importance if body.importance is None else body.importance,
        body.confidence,
    )
    done = service.supersede(services.database, memory_id, new, caller.namespace, caller.name, note=body.note)
    return RememberedOut(**memory_fields(done.memory), created=done.created)


@router.post(
    "/{memory_id}/breakthrough",
    summary="Mark a breakthrough",
    dependencies=_WRITES,
    responses=problems.documented(404, 409, 422),
)
def breakthrough(
    memory_id: _Id,
    services: InjectedServices,
    caller: InjectedCaller,
    body: Annotated[BreakthroughIn, bodies.of(BreakthroughIn)],
) -> MemoryOut:
    """The memory is an insight that changed the work; or, with `breakthrough: false`, what it was before."""
    found = service.mark(
        services.database,
        memory_id,
        caller.namespace,
        caller.name,
        is_breakthrough=body.breakthrough,
        note=body.note,
    )
    return memory_out(found)


@router.delete("/{memory_id}", summary="Forget a memory", dependencies=_WRITES, responses=problems.documented(404))
def delete(memory_id: _Id, services: InjectedServices, caller: InjectedCaller) -> ForgottenOut:
    """Delete one memory for real, as `POST /v1/memories/forget` does."""
    return forgotten_out(forgetting.forget(services.database, [memory_id], caller.namespace))


def _by_hand(caller: Caller) -> MemorySource:
    return MemorySource(MemoryOrigin.HAND, caller.name)
