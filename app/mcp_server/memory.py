"""The tool of conversations and long-term memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import Field, model_validator

from app.mcp_server.tool import McpCall, NameText, ServedTool, ToolArguments, object_of

#: What each action needs.
_NEEDS = {
    "read": ("conversation_id",),
    "append": ("conversation_id", "messages"),
    "delete_conversation": ("conversation_id",),
    "search": ("query",),
    "recall": ("query",),
    "remember": ("text",),
    "find_memories": ("query",),
    "forget": ("memory_ids",),
}


class SpokenMessage(ToolArguments):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(min_length=1, max_length=400_000)]
    name: Annotated[str, Field(max_length=64)] | None = None


class MemoryArguments(ToolArguments):
    """What to do with which conversation or memory."""

    action: Literal[
        "list",
        "create",
        "read",
        "append",
        "search",
        "recall",
        "remember",
        "memories",
        "find_memories",
        "forget",
        "delete_conversation",
    ] = Field(
        description="list, create, read, append, delete_conversation: conversations; search: what was said; recall: "
        "passages of messages, memories and documents by meaning; remember, memories: long-term memory; forget "
        "deletes memories for real, by the ids that find_memories returns"
    )
    conversation_id: NameText | None = None
    user: NameText | None = Field(
        default=None, description="whose conversations and memories; by default the namespace's"
    )
    title: Annotated[str, Field(max_length=200)] | None = Field(default=None, description="with create")
    messages: list[SpokenMessage] = Field(default=[], max_length=100, description="with create and append")
    query: Annotated[str, Field(min_length=1, max_length=1_000)] | None = Field(
        default=None, description="with search, recall and find_memories"
    )
    text: Annotated[str, Field(min_length=1, max_length=2_000)] | None = Field(
        default=None, description="with remember: one short statement"
    )
    kind: Literal["fact", "preference", "decision", "breakthrough", "pattern"] | None = Field(
        default=None, description="with remember and memories"
    )
    memory_ids: list[NameText] = Field(default=[], max_length=100, description="with forget")
    limit: int = Field(default=20, ge=1, le=50)
    after: NameText | None = Field(default=None, description="the cursor of an earlier list")

    @model_validator(mode="after")
    def _is_complete(self) -> MemoryArguments:
        for name in _NEEDS.get(self.action, ()):
            if not getattr(self, name):
                raise ValueError(f"action {self.action!r} needs {name!r}")
        return self


async def manage(call: McpCall[MemoryArguments]) -> dict[str, Any]:
    """Do one thing with a conversation or with memories."""
    asked, api = call.arguments, call.api
    here = f"/v1/conversations/{quote(asked.conversation_id or '', safe='')}"
    messages = [one.model_dump(exclude_none=True) for one in asked.messages]
    match asked.action:
        case "list":
            return dict(await api.get("/v1/conversations", user=asked.user, limit=asked.limit, after=asked.after))
        case "create":
            named = {name: value for name, value in {"title": asked.title, "user": asked.user}.items() if value}
            made = await api.post("/v1/conversations", named)
            if messages:
                await api.post(f"/v1/conversations/{made['id']}/messages", {"messages": messages})
            return {"conversation": made}
        case "read":
            found = await api.get(f"{here}/messages", limit=asked.limit, after=asked.after)
            return {"conversation": await api.get(here), **found}
        case "append":
            return {"appended": await api.post(f"{here}/messages", {"messages": messages})}
        case "delete_conversation":
            return {"deleted": await api.delete(here)}
        case "search":
            path = f"{here}/search" if asked.conversation_id else "/v1/conversations/search"
            user = None if asked.conversation_id else asked.user
            return dict(await api.get(path, q=asked.query, user=user, limit=asked.limit))
        case "recall":
            body: dict[str, Any] = {"query": asked.query, "limit": asked.limit}
            body |= {"user": asked.user} if asked.user else {}
            if asked.conversation_id:
                body["conversations"] = [asked.conversation_id]
            return dict(await api.post("/v1/recall", body))
        case "remember":
            given = {"text": asked.text, "kind": asked.kind, "user": asked.user, "conversation": asked.conversation_id}
            return {"memory": await api.post("/v1/memories", {name: one for name, one in given.items() if one})}
        case "memories":
            return dict(
                await api.get("/v1/memories", user=asked.user, kind=asked.kind, limit=asked.limit, after=asked.after)
            )
        case "find_memories":
            sought = {"query": asked.query} | ({"user": asked.user} if asked.user else {})
            return dict(await api.post("/v1/memories/forget", sought))
        case "forget":
            return {"forgotten": await api.post("/v1/memories/forget", {"ids": asked.memory_ids})}


TOOLS: tuple[ServedTool[Any], ...] = (
    ServedTool(
        "conversation_memory_management",
        "Conversations and memory",
        "Creates, continues, reads, searches and deletes conversations; recalls passages by meaning; remembers "
        "statements and forgets them for real. Deleting cannot be undone.",
        MemoryArguments,
        object_of(),
        manage,
        destroys=True,
    ),
)
