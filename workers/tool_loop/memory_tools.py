"""
The tools of agents on conversations, memories and memory blocks.

They see what belongs to the namespace of the run, and to the user and the conversation of the step. Results are JSON,
with ids and scores. An edit of a block is made once, however often its call is tried.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel import clock
from app.kernel.database import Database
from app.kernel.errors import FailureReason, NotFound, StepFailure
from app.kernel.sections.blocks import BlockSettings
from app.kernel.sections.memory import ConversationSettings
from app.memory.blocks import rendering
from app.memory.blocks import storage as block_storage
from app.memory.blocks import tools as block_tools
from app.memory.blocks.block import BlockAuthor, BlockAuthorKind, BlockScope
from app.memory.blocks.tools import BlockToolContext
from app.memory.conversations.message import StoredMessage
from app.memory.conversations.service import Conversations, parsed_conversation
from app.memory.memories import service as memories
from app.memory.memories.kinds import MemoryKind
from app.memory.memories.memory import Memory
from app.memory.memories.store import MemoryFilter
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import Recalled, RecalledPassage, RecallQuery, RecallScope
from app.memory.recall.service import Recall
from workers.memory import run_links
from workers.tool_loop.tools import ToolDescription

#: Characters of a token, where nobody counts: a result says so.
_CHARACTERS_PER_TOKEN = 4
#: Most messages that are looked through without a query, and that a context has.
_LOOKED_AT, _RECENT = 500, 40
_DONE_ALREADY = text("SELECT 1 FROM memory_block_version WHERE run_id = :run_id AND step = :step LIMIT 1")


@dataclass(frozen=True, slots=True)
class MemoryAccess:
    """For whom the tools work."""

    database: Database
    recall: Recall
    namespace: str
    user: str | None
    #: The public id.
    conversation: str | None
    conversations: ConversationSettings
    blocks: BlockSettings
    #: The name of the agent, to which blocks can be attached: that of its workflow.
    agent: str
    #: The model, the run and the key of the call.
    model: str
    run_id: str
    key: str


def _schema(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


_INSTANT = {"type": "string", "maxLength": 40, "description": "An instant, such as 2026-11-21T09:00:00Z."}
_QUERY = {"type": "string", "minLength": 1, "maxLength": 1_000, "description": "What to look for."}
_COUNT = {"type": "integer", "minimum": 1, "maximum": 50, "default": 10}
_DESCRIBED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lookup_history": (
        "Find earlier messages of the conversation. Without a query, the latest ones.",
        _schema(
            {
                "query": _QUERY,
                "roles": {"type": "array", "maxItems": 4, "items": {"enum": ["system", "user", "assistant", "tool"]}},
                "start": _INSTANT,
                "end": _INSTANT,
                "limit": _COUNT,
            }
        ),
    ),
    "query_memory": (
        "Find what is remembered: facts, preferences, decisions, breakthroughs and patterns.",
        _schema(
            {
                "query": _QUERY,
                "kinds": {"type": "array", "maxItems": 5, "items": {"enum": [kind.value for kind in MemoryKind]}},
                "as_of": _INSTANT,
                "k": _COUNT,
            },
            "query",
        ),
    ),
    "recall_breakthroughs": (
        "Find breakthroughs that are remembered, about a topic or the latest ones.",
        _schema({"topic": _QUERY, "since": _INSTANT, "k": _COUNT}),
    ),
    "get_enriched_context": (
        "Get what is known about a question: the latest messages, what was said about it, and breakthroughs.",
        _schema(
            {"query": _QUERY, "token_budget": {"type": "integer", "minimum": 50, "maximum": 20_000, "default": 1_000}},
            "query",
        ),
    ),
}


def blocks_of(database: Database, scope: BlockScope) -> str:
    """Return the text of the blocks that are in the prompts of a scope; empty without any."""
    with database.work() as work:
        return rendering.render([one.block for one in block_storage.in_context_in(work, scope)])


def describe(names: Sequence[str]) -> list[ToolDescription]:
    """Return these tools for the model."""
    own = {name: ToolDescription(name, *about) for name, about in _DESCRIBED.items()}
    blocks = {
        name: ToolDescription(name, block_tools.DESCRIPTIONS[name], schema)
        for name, schema in block_tools.SCHEMAS.items()
    }
    return [(own | blocks)[name] for name in names]


def call(access: MemoryAccess, name: str, arguments: Mapping[str, Any]) -> str:
    """Return the result of a tool. Raises StepFailure for a call that the model must write otherwise."""
    match name:
        case "lookup_history":
            found: Any = _history(access, arguments)
        case "query_memory":
            found = _memories(access, arguments["query"], arguments)
        case "recall_breakthroughs":
            found = _breakthroughs(access, arguments)
        case "get_enriched_context":
            found = _context(access, arguments["query"], arguments.get("token_budget", 1_000))
        case _:
            return _edit(access, name, arguments)
    return json.dumps(found, ensure_ascii=False)


def _history(access: MemoryAccess, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    limit, roles = arguments.get("limit", 10), tuple(arguments.get("roles", ()))
    since, until = _instant(arguments, "start"), _instant(arguments, "end")
    if "query" in arguments:
        conversations = (access.conversation,) if access.conversation else ()
        query = RecallQuery(
            arguments["query"],
            access.namespace,
            access.user,
            limit=limit,
            sources=(SourceKind.MESSAGE,),
            conversations=conversations,
            roles=roles,
            since=since,
            until=until,
        )
        return [_passage(one) for one in _searched(access, query).passages]
    latest = [
        message
        for message in _latest(access, _LOOKED_AT)
        if (not roles or message.role.value in roles)
        and (since is None or message.created_at >= since)
        and (until is None or message.created_at < until)
    ]
    return [_message(one) for one in latest[-limit:]]


def _latest(access: MemoryAccess, limit: int) -> list[StoredMessage]:
    """The last messages of the conversation, the oldest first. Raises StepFailure without one."""
    if access.conversation is None:
        raise _wrong("the step has no conversation: give a `query` to look through those of the user")
    service, id_ = Conversations(access.database, access.conversations), parsed_conversation(access.conversation)
    try:
        found = service.get(id_, access.namespace, access.conversation)
    except NotFound as error:
        raise _wrong(str(error)) from None
    return service.read(found.id, limit=limit, newest_first=True)[::-1]


def _memories(access: MemoryAccess, topic: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    k, as_of = arguments.get("k", 10), _instant(arguments, "as_of") or clock.now()
    query = RecallQuery(
        topic,
        access.namespace,
        access.user,
        RecallScope.SHARED,
        limit=min(4 * k, 200),  # some of them hold no more
        sources=(SourceKind.MEMORY,),
        kinds=tuple(arguments.get("kinds", ())),
        since=_instant(arguments, "since"),
    )
    found: list[dict[str, Any]] = []
    said_in: list[UUID | None] = []
    for passage in access.recall.search(query).passages:
        try:
            memory = memories.get(access.database, passage.source_id, access.namespace)
        except NotFound:
            continue
        if memory.holds_at(as_of):
            found.append(_memory(memory) | {"score": round(passage.score, 4)})
            said_in.append(memory.conversation_id)
    run_links.link(access.database, UUID(access.run_id), said_in[:k])
    return found[:k]


def _breakthroughs(access: MemoryAccess, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "topic" in arguments:
        return _memories(access, arguments["topic"], {**arguments, "kinds": [MemoryKind.BREAKTHROUGH.value]})
    since, k = _instant(arguments, "since"), arguments.get("k", 10)
    of = MemoryFilter(access.namespace, access.user, MemoryKind.BREAKTHROUGH)
    latest = memories.page(access.database, of, limit=100).memories
    chosen = [one for one in latest if since is None or one.valid_from >= since][:k]
    run_links.link(access.database, UUID(access.run_id), (one.conversation_id for one in chosen))
    return [_memory(one) for one in chosen]


def _searched(access: MemoryAccess, query: RecallQuery) -> Recalled:
    """What recall finds; the run holds it then."""
    found = access.recall.search(query)
    run_links.link_recalled(access.database, UUID(access.run_id), found)
    return found


def _context(access: MemoryAccess, question: str, budget: int) -> dict[str, Any]:
    """What is known about a question: half of the budget for the latest messages, the rest for what was found."""
    left, parts = budget * _CHARACTERS_PER_TOKEN, dict[str, list[dict[str, Any]]]()
    recent = [_message(one) for one in _latest(access, _RECENT)] if access.conversation else []
    chosen: list[dict[str, Any]] = []
    for one in reversed(recent):
        if sum(map(_length, chosen)) + _length(one) > left // 2:
            break
        chosen.append(one)
    parts["recent"] = chosen[::-1]
    left -= sum(map(_length, chosen))
    seen = {one["id"] for one in chosen}
    breakthroughs = _memories(access, question, {"kinds": [MemoryKind.BREAKTHROUGH.value], "k": 5})
    query = RecallQuery(question, access.namespace, access.user, RecallScope.SHARED, limit=20)
    recalled = _searched(access, query)
    semantic = [_passage(one) for one in recalled.passages]
    skipped = 0
    for name, candidates in (("breakthroughs", breakthroughs), ("semantic", semantic)):
        parts[name] = []
        for one in candidates:
            if one["id"] in seen:
                continue
            if _length(one) > left:
                skipped += 1
                continue
            seen.add(one["id"])
            parts[name].append(one)
            left -= _length(one)
    used = budget - left // _CHARACTERS_PER_TOKEN
    about: dict[str, Any] = {"tokens": used, "tokens_are": "estimated", "left_out": skipped + len(recent) - len(chosen)}
    if not recalled.dense.used:  # what was found was found by its words alone
        about["without_vectors"] = recalled.dense.reason or "no vectors"
    return {**parts, **about}


def _edit(access: MemoryAccess, name: str, arguments: Mapping[str, Any]) -> str:
    scope = BlockScope(access.namespace, access.user, access.conversation, access.agent)
    author = BlockAuthor(BlockAuthorKind.MODEL, access.model, access.run_id, access.key)
    query = block_tools.recall_query(scope, name, arguments)
    recalled = None if query is None else access.recall.search(query)
    with access.database.work() as work:
        if work.row(_DONE_ALREADY, {"run_id": access.run_id, "step": access.key}) is not None:
            return "This was done before."
        answer = block_tools.call(work, BlockToolContext(scope, author, access.blocks, recalled), name, arguments)
    if answer.is_error:
        raise _wrong(answer.text)
    return answer.text


def _passage(one: RecalledPassage) -> dict[str, Any]:
    found = {"id": one.source_id, "source": one.source, "at": one.at.isoformat(), "score": round(one.score, 4)}
    about = {"role": one.role, "speaker": one.speaker, "kind": one.kind, "conversation": one.conversation}
    return {**found, **{name: value for name, value in about.items() if value}, "text": one.text}


def _message(one: StoredMessage) -> dict[str, Any]:
    return {"id": f"msg_{one.id.hex}", "at": one.created_at.isoformat(), "role": one.role.value, "text": one.content}


def _memory(one: Memory) -> dict[str, Any]:
    found = {"id": memories.shown(one.id), "kind": one.kind, "valid_from": one.valid_from.isoformat(), "text": one.text}
    return found if one.invalid_at is None else {**found, "invalid_at": one.invalid_at.isoformat()}


def _length(one: Mapping[str, Any]) -> int:
    return len(json.dumps(one, ensure_ascii=False))


def _instant(arguments: Mapping[str, Any], name: str) -> datetime | None:
    if name not in arguments:
        return None
    try:
        found = datetime.fromisoformat(arguments[name])
    except ValueError:
        raise _wrong(f"{name} is not an instant; write 2026-11-21T09:00:00Z") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _wrong(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)
