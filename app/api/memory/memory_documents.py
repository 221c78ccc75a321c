"""The bodies and answers of the resource `memories`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from app.files.file import shown_id
from app.memory.conversations.conversation import CONVERSATION_PREFIX
from app.memory.conversations.message import MESSAGE_PREFIX
from app.memory.memories import forgetting
from app.memory.memories.forgetting import Forgotten
from app.memory.memories.kinds import MAX_NOTE, MAX_SOURCES, MAX_TEXT, MAX_USER, MemoryKind, MemoryOrigin
from app.memory.memories.memory import Memory
from app.memory.memories.service import shown

Note = Annotated[str, Field(max_length=MAX_NOTE, description="why, in words; the history shows it")]


class _MemoryBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MemoryIn(_MemoryBody):
    """Something to remember."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"text": "Ana prefers tea to coffee.", "kind": "preference", "user": "ana"}]},
    )

    text: str = Field(min_length=1, max_length=MAX_TEXT, description="one short statement")
    kind: MemoryKind = MemoryKind.FACT
    user: str | None = Field(default=None, max_length=MAX_USER, description="whose it is; null: the whole namespace's")
    conversation: str | None = Field(default=None, max_length=100, description="the conversation that it comes from")
    messages: list[str] = Field(
        default=[], max_length=MAX_SOURCES - 1, description="ids of the messages that it comes from"
    )
    valid_from: AwareDatetime | None = Field(default=None, description="since when it holds; by default now")
    importance: float = Field(default=0.5, ge=0, le=1)
    confidence: float = Field(default=1.0, ge=0, le=1)
    supersedes: str | None = Field(
        default=None, max_length=100, description="the id of a memory that no longer holds, and whose place this takes"
    )
    note: Note = ""


class SuccessorIn(_MemoryBody):
    """What takes the place of a memory. What is not said here is as it was."""

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    kind: MemoryKind | None = None
    messages: list[str] = Field(default=[], max_length=MAX_SOURCES - 1)
    valid_from: AwareDatetime | None = None
    importance: float | None = Field(default=None, ge=0, le=1)
    confidence: float = Field(default=1.0, ge=0, le=1)
    note: Note = ""


class InvalidationIn(_MemoryBody):
    """The end of a memory."""

    at: AwareDatetime | None = Field(default=None, description="since when it holds no more; by default now")
    note: Note = ""


class BreakthroughIn(_MemoryBody):
    """Whether a memory is a breakthrough."""

    breakthrough: bool = True
    note: Note = ""


class ForgetIn(_MemoryBody):
    """Which memories are deleted for real. One of `ids`, `query` and `everything` is needed."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"query": "coffee", "user": "ana"}, {"ids": ["mem_…"]}]}
    )

    ids: list[str] = Field(default=[], max_length=forgetting.MAX_IDS, description="these memories")
    with_history: bool = Field(
        default=False, description="with `ids`: also those that they superseded and that superseded them"
    )
    query: str | None = Field(
        default=None,
        min_length=1,
        max_length=1_000,
        description="shows the memories that are meant, and deletes nothing: send their `ids` then",
    )
    user: str | None = Field(default=None, min_length=1, max_length=MAX_USER)
    everything: bool = Field(default=False, description="with `user`: all memories of that user")

    @model_validator(mode="after")
    def _says_one_thing(self) -> ForgetIn:
        if sum((bool(self.ids), self.query is not None, self.everything)) != 1:
            raise ValueError("exactly one of 'ids', 'query' and 'everything: true' is required")
        if self.everything and self.user is None:
            raise ValueError("'everything' needs 'user'")
        if self.ids and self.user is not None:
            raise ValueError("'user' goes with 'query' or 'everything', not with 'ids'")
        if self.with_history and not self.ids:
            raise ValueError("'with_history' needs 'ids'")
        return self


class MemorySourceOut(BaseModel):
    """Where a memory comes from."""

    origin: MemoryOrigin
    author: str = Field(description="who wrote it: the name of an API key, a workflow, or the role of a message")
    conversation: str | None
    message: str | None
    run: str | None


class MemoryOut(BaseModel):
    """A memory."""

    id: str
    namespace: str
    user: str | None
    kind: MemoryKind
    text: str
    importance: float
    confidence: float
    valid_from: datetime
    invalid_at: datetime | None = Field(description="since when it holds no more; null: it holds")
    superseded_by: str | None = Field(description="the memory that took its place")
    conversation: str | None
    sources: list[MemorySourceOut]
    created_at: datetime
    last_used_at: datetime | None = Field(description="when it was last part of a prompt or of an answer")
    uses: int


class RememberedOut(MemoryOut):
    """A memory that was asked for."""

    created: bool = Field(description="false: a memory that holds says the same, and is returned")


class MemoryListOut(BaseModel):
    """A part of the list of memories, the newest first."""

    memories: list[MemoryOut]
    has_more: bool
    last_id: str | None = Field(description="`after` for the next part")


class MemoryEventOut(BaseModel):
    """Something that happened to a memory."""

    memory: str
    event: str
    at: datetime
    author: str
    note: str
    detail: str = Field(description="the memory that took its place, or the kind that it had")


class MemoryHistoryOut(BaseModel):
    """The memories that took each other's place, the oldest first, and what happened."""

    memories: list[MemoryOut]
    events: list[MemoryEventOut]


class SearchedOut(BaseModel):
    """A search after a deletion."""

    where: str
    by: str = Field(description="`id`, `user`, or `text`: other memories may say a part of the same")
    found: int


class ForgottenOut(BaseModel):
    """What was forgotten, and a search for it afterwards; or a preview."""

    preview: bool = Field(description="true: nothing was deleted")
    forgotten: list[str] = Field(description="ids of deleted memories")
    matches: list[MemoryOut] = Field(description="of a preview: the memories that are meant")
    proved: bool = Field(description="nothing was found by id or user")
    searched: list[SearchedOut]
    messages: list[str] = Field(description="messages that said it: they are still in their conversations")


def memory_out(memory: Memory) -> MemoryOut:
    """Return a memory as the API shows it."""
    return MemoryOut(**memory_fields(memory))


def memory_fields(memory: Memory) -> dict[str, Any]:
    """Return the fields of a memory as the API shows it."""
    return {
        "id": shown(memory.id),
        "namespace": memory.namespace,
        "user": memory.user,
        "kind": MemoryKind(memory.kind),
        "text": memory.text,
        "importance": memory.importance,
        "confidence": memory.confidence,
        "valid_from": memory.valid_from,
        "invalid_at": memory.invalid_at,
        "superseded_by": None if memory.superseded_by is None else shown(memory.superseded_by),
        "conversation": _conversation(memory.conversation_id),
        "sources": [
            MemorySourceOut(
                origin=one.origin,
                author=one.author,
                conversation=_conversation(one.conversation_id),
                message=None if one.message_id is None else shown_id(one.message_id, MESSAGE_PREFIX),
                run=None if one.run_id is None else str(one.run_id),
            )
            for one in memory.sources
        ],
        "created_at": memory.created_at,
        "last_used_at": memory.last_used_at,
        "uses": memory.uses,
    }


def _conversation(id_: Any) -> str | None:
    return None if id_ is None else shown_id(id_, CONVERSATION_PREFIX)


def forgotten_out(done: Forgotten | None, matches: Sequence[Memory] = ()) -> ForgottenOut:
    """Return what was forgotten; without it, a preview."""
    found = [memory_out(one) for one in matches]
    if done is None:
        return ForgottenOut(preview=True, forgotten=[], matches=found, proved=False, searched=[], messages=[])
    return ForgottenOut(
        preview=False,
        forgotten=[shown(one) for one in done.ids],
        matches=found,
        proved=done.is_proved,
        searched=[SearchedOut(where=one.where, by=one.by, found=one.found) for one in done.searched],
        messages=[shown_id(one, MESSAGE_PREFIX) for one in done.messages],
    )
