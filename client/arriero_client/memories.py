"""Memories: what is remembered of users and namespaces, beyond one conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from arriero_client import exchange
from arriero_client.effects import Operation, Request
from arriero_client.exchange import Retries
from arriero_client.operations import operation


class Memory(BaseModel):
    """A memory. Fields that a newer server adds are kept as extra attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str
    namespace: str = ""
    user: str | None = None
    kind: str = "fact"
    text: str
    importance: float = 0.5
    confidence: float = 1.0
    valid_from: datetime
    #: Since when it holds no more; None: it holds.
    invalid_at: datetime | None = None
    #: The id of the memory that took its place.
    superseded_by: str | None = None
    conversation: str | None = None
    sources: Sequence[Mapping[str, Any]] = ()
    #: Of `remember`: False if a memory that holds says the same.
    created: bool = True


class ForgottenMemories(BaseModel):
    """What was forgotten, and the search for it afterwards; or a preview."""

    model_config = ConfigDict(extra="allow", frozen=True)

    preview: bool
    forgotten: Sequence[str]
    matches: Sequence[Memory] = ()
    proved: bool
    searched: Sequence[Mapping[str, Any]]
    #: Messages that said it, which are still in their conversations.
    messages: Sequence[str] = ()


class Memories:
    """The operations on memories."""

    retries: Retries

    @operation
    def remember(
        self,
        text: str,
        *,
        kind: str = "fact",
        user: str | None = None,
        conversation: str | None = None,
        messages: Sequence[str] = (),
        supersedes: str | None = None,
        importance: float = 0.5,
        valid_from: str | None = None,
        note: str = "",
    ) -> Operation[Memory]:
        """Remember a statement. One that holds and says the same is returned instead."""
        body = {"text": text, "kind": kind, "user": user, "messages": list(messages), "importance": importance}
        given = {"conversation": conversation, "supersedes": supersedes, "valid_from": valid_from, "note": note or None}
        body |= {name: value for name, value in given.items() if value is not None}
        request = Request("POST", "/v1/memories", body=body)
        return Memory.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def memories(
        self,
        *,
        user: str | None = None,
        kind: str | None = None,
        conversation: str | None = None,
        as_of: str | None = None,
        everything: bool = False,
        after: str | None = None,
        limit: int = 100,
    ) -> Operation[Sequence[Memory]]:
        """Return memories that hold, or held `as_of` an instant, or all; the newest first."""
        parameters = {"user": user, "kind": kind, "conversation": conversation, "as_of": as_of, "after": after}
        request = Request("GET", "/v1/memories", {**parameters, "limit": limit, "all": "true" if everything else None})
        found = yield from exchange.send_json(request, self.retries)
        return [Memory.model_validate(one) for one in found["memories"]]

    @operation
    def memory(self, memory_id: str) -> Operation[Memory]:
        """Return a memory."""
        request = Request("GET", _path(memory_id))
        return Memory.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def invalidate_memory(self, memory_id: str, *, note: str = "") -> Operation[Memory]:
        """End a memory: it holds no more. Its text stays."""
        request = Request("POST", f"{_path(memory_id)}/invalidate", body={"note": note}, repeatable=False)
        return Memory.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def supersede_memory(self, memory_id: str, text: str, *, note: str = "") -> Operation[Memory]:
        """Put another memory in the place of one."""
        request = Request("POST", f"{_path(memory_id)}/supersede", body={"text": text, "note": note})
        return Memory.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def mark_breakthrough(self, memory_id: str, *, breakthrough: bool = True, note: str = "") -> Operation[Memory]:
        """Mark a memory as a breakthrough, or as none."""
        body = {"breakthrough": breakthrough, "note": note}
        request = Request("POST", f"{_path(memory_id)}/breakthrough", body=body)
        return Memory.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def matching_memories(self, query: str, *, user: str | None = None) -> Operation[Sequence[Memory]]:
        """Return the memories that a request to forget may mean. Nothing is deleted."""
        request = Request("POST", "/v1/memories/forget", body={"query": query, "user": user})
        found = yield from exchange.send_json(request, self.retries)
        return ForgottenMemories.model_validate(found).matches

    @operation
    def forget(self, *memory_ids: str, with_history: bool = False) -> Operation[ForgottenMemories]:
        """Delete memories for real; with `with_history` also those whose place they took."""
        body = {"ids": list(memory_ids), "with_history": with_history}
        request = Request("POST", "/v1/memories/forget", body=body, repeatable=False)
        return ForgottenMemories.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def forget_user(self, user: str) -> Operation[ForgottenMemories]:
        """Delete all memories of a user for real."""
        request = Request("POST", "/v1/memories/forget", body={"user": user, "everything": True})
        return ForgottenMemories.model_validate((yield from exchange.send_json(request, self.retries)))


def _path(memory_id: str) -> str:
    return f"/v1/memories/{quote(memory_id, safe='')}"
