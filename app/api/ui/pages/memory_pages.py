"""The pages of memory: conversations with what models were told, memories, and blocks with their versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import Path, Query, Request, Response
from fastapi.responses import HTMLResponse

from app.access import namespaces
from app.access.callers import Caller, KeyScope
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.memory import blocks as blocks_resource
from app.api.memory import conversations as conversations_resource
from app.api.memory import memories as memories_resource
from app.api.memory import messages as messages_resource
from app.api.memory import search as search_resource
from app.api.memory.parts import Conversing
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.api.ui.rendering import render
from app.api.workflows import runs as runs_resource
from app.kernel.errors import NotFound
from app.memory.memories.kinds import MemoryKind

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

#: Messages of one page of a conversation.
_PAGE = 100
_Text = Annotated[str, Query(max_length=500, pattern=r"^[^\x00]*$")]
_User = Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$")]
_Id = Annotated[str, Path(max_length=100)]
_After = Annotated[str | None, Query(max_length=100)]


@router.get("/conversations")
def conversations(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    conversing: Conversing,
    namespace: ListedNamespace,
    q: _Text = "",
    user: _User = "",
    after: _After = None,
) -> HTMLResponse:
    """Conversations, or the messages that a search finds."""
    found = listed = None
    if q.strip():
        found = search_resource.search(services, namespace, q, user or None)
    else:
        listed = conversations_resource.page(conversing, namespace, user=user or None, limit=50, after=after)
    return render(
        request,
        caller,
        "conversations.html",
        title="Conversations",
        q=q,
        user=user,
        found=found,
        conversations=[] if listed is None else listed.data,
        next=listed.last_id if listed is not None and listed.has_more else None,
    )


@router.get("/conversations/{conversation_id}")
def conversation(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    conversing: Conversing,
    conversation_id: _Id,
    after: _After = None,
) -> HTMLResponse:
    """A conversation: what was said, and what the model was told for each answer."""
    found = conversations_resource.get(conversation_id, conversing, caller)
    page = messages_resource.list_messages(conversation_id, conversing, caller, limit=_PAGE, order="desc", after=after)
    messages = page.data[::-1]
    blocks = blocks_resource.in_context(services, found.namespace, conversation=found.id, user=found.user)
    remembered = memories_resource.page(services, found.namespace, conversation=found.id, limit=20)
    return render(
        request,
        caller,
        "conversation.html",
        title=found.title or "Conversation",
        conversation=found,
        messages=messages,
        next=page.last_id if page.has_more else None,
        told={one.run_id: _told(services, caller, one.run_id) for one in messages if one.run_id},
        blocks=blocks.blocks,
        memories=remembered.memories,
    )


@router.get("/memories")
def memories(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    namespace: ListedNamespace,
    user: _User = "",
    kind: MemoryKind | None = None,
    all_times: Annotated[bool, Query(alias="all")] = False,
    after: _After = None,
) -> HTMLResponse:
    """Memories, by user and kind."""
    found = memories_resource.page(
        services, namespace, user=user or None, kind=kind, all_times=all_times, after=after, limit=100
    )
    return render(
        request,
        caller,
        "memories.html",
        title="Memories",
        memories=found.memories,
        next=found.last_id if found.has_more else None,
        user=user,
        kind=kind or "",
        kinds=list(MemoryKind),
        all_times=all_times,
        at=at_namespace(namespace),
    )


@router.get("/memories/{memory_id}")
def memory(request: Request, caller: InjectedCaller, services: InjectedServices, memory_id: _Id) -> HTMLResponse:
    """A memory: where it comes from, and what became of it."""
    found = memories_resource.get(memory_id, services, caller)
    history = memories_resource.history(memory_id, services, caller)
    return render(request, caller, "memory.html", title="Memory", memory=found, history=history)


@router.get("/blocks")
def blocks(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    namespace: ListedNamespace,
    cursor: _After = None,
) -> HTMLResponse:
    """Blocks, with what they are attached to."""
    found = blocks_resource.page(services, namespace, cursor=cursor)
    return render(
        request,
        caller,
        "blocks.html",
        title="Blocks",
        blocks=found.blocks,
        next=found.next_cursor,
        at=at_namespace(namespace),
    )


@router.get("/blocks/{block_id}")
def block(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    namespace: ListedNamespace,
    block_id: _Id,
    old: Annotated[int | None, Query(alias="from", ge=1, lt=2**31)] = None,
    new: Annotated[int | None, Query(alias="to", ge=1, lt=2**31)] = None,
) -> HTMLResponse:
    """A block: its text, its versions, and what changed between two of them."""
    found = blocks_resource.get(block_id, services, namespace, Response())
    diff = blocks_resource.diff(block_id, services, namespace, old, new)
    return render(
        request,
        caller,
        "block.html",
        title=found.label,
        block=found,
        versions=blocks_resource.versions(block_id, services, namespace, limit=100).versions,
        diff=diff,
        lines=[line for line in diff.diff.splitlines() if not line.startswith(("---", "+++"))],
    )


def at_namespace(namespace: str | None) -> str:
    """Return the query of a change in this namespace."""
    return "" if namespace in (None, namespaces.DEFAULT) else f"?namespace={namespace}"


def _told(services: Services, caller: Caller, run_id: str) -> Mapping[str, Any] | None:
    """What the prompt of an answer was made of; None when its run is gone, or belongs to others."""
    try:
        run = runs_resource.get(UUID(run_id), services, caller)
    except NotFound:
        return None
    attempts = [attempt for step in run.steps for attempt in step.attempts if attempt.assembly]
    return attempts[-1].assembly if attempts else None
