"""Conversations: what was said, to continue, read, search and delete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from arriero_client import exchange
from arriero_client.effects import Emit, Operation, Request
from arriero_client.exchange import Retries
from arriero_client.operations import operation, stream
from arriero_client.results import Conversation, DeletionProof, FoundMessage, Message

#: Messages that `messages` reads at a time.
_PART = 100


class Conversations:
    """The operations on conversations."""

    retries: Retries

    @operation
    def create_conversation(
        self,
        *,
        user: str | None = None,
        title: str | None = None,
        metadata: Mapping[str, str] | None = None,
        model: str | None = None,
        retention: str | None = None,
        namespace: str | None = None,
    ) -> Operation[Conversation]:
        """Create a conversation. `retention` is a duration such as `30d`."""
        given: dict[str, Any] = {"user": user, "title": title, "model": model, "retention": retention}
        body = {name: value for name, value in given.items() if value is not None}
        body["metadata"] = dict(metadata or {})
        request = Request("POST", "/v1/conversations", {"namespace": namespace}, body=body, repeatable=False)
        return Conversation.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def conversation(self, conversation_id: str) -> Operation[Conversation]:
        """Return a conversation, without its messages."""
        request = Request("GET", _of(conversation_id))
        return Conversation.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def conversations(
        self,
        *,
        user: str | None = None,
        metadata: Mapping[str, str] | None = None,
        title: str | None = None,
        since: str | None = None,
        until: str | None = None,
        namespace: str | None = None,
        limit: int = 20,
        after: str | None = None,
    ) -> Operation[Sequence[Conversation]]:
        """Return conversations, the newest first. `after` is the id of the last known one."""
        query: dict[str, Any] = {"user": user, "title": title, "since": since, "until": until}
        query |= {"namespace": namespace, "limit": limit, "after": after}
        query["metadata"] = [f"{name}:{value}" for name, value in (metadata or {}).items()] or None
        found = yield from exchange.send_json(Request("GET", "/v1/conversations", query), self.retries)
        return [Conversation.model_validate(one) for one in found["data"]]

    @operation
    def append_messages(
        self, conversation_id: str, messages: Iterable[Mapping[str, Any]]
    ) -> Operation[Sequence[Message]]:
        """
        Append messages in the form of chat completions, next to each other, and return them.

        It is sent again when the connection is lost; the server appends the messages once.
        """
        body = {"messages": [dict(message) for message in messages]}
        headers = {"Idempotency-Key": exchange.new_key()}
        request = Request("POST", _of(conversation_id, "messages"), body=body, headers=headers)
        found = yield from exchange.send_json(request, self.retries)
        return [Message.model_validate(one) for one in found["data"]]

    @stream
    def messages(self, conversation_id: str, *, newest_first: bool = False) -> Operation[type[Message]]:
        """Yield the messages of a conversation, part by part."""
        after: str | None = None
        while True:
            query = {"order": "desc" if newest_first else "asc", "limit": _PART, "after": after}
            request = Request("GET", _of(conversation_id, "messages"), query)
            found = yield from exchange.send_json(request, self.retries)
            for one in found["data"]:
                yield Emit(Message.model_validate(one))
            if not found["has_more"]:
                return Message
            after = found["last_id"]

    @operation
    def search_messages(
        self,
        query: str,
        *,
        conversation_id: str | None = None,
        user: str | None = None,
        roles: Sequence[str] = (),
        namespace: str | None = None,
        limit: int = 20,
    ) -> Operation[Sequence[FoundMessage]]:
        """Return messages by their words and their meaning, the best first; of one conversation, or of all."""
        given: dict[str, Any] = {"q": query, "limit": limit, "role": list(roles) or None}
        if conversation_id is None:
            given |= {"user": user, "namespace": namespace}
        path = "/v1/conversations/search" if conversation_id is None else _of(conversation_id, "search")
        found = yield from exchange.send_json(Request("GET", path, given), self.retries)
        return [FoundMessage.model_validate(one) for one in found["data"]]

    @operation
    def fork_conversation(
        self, conversation_id: str, *, at: str | int | None = None, title: str | None = None
    ) -> Operation[Conversation]:
        """Return a new conversation with the messages up to `at`, an id or a number, or with all of them."""
        body = {"at": at, "title": title}
        request = Request("POST", _of(conversation_id, "fork"), body=body, repeatable=False)
        return Conversation.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def export_conversation(self, conversation_id: str, *, format: str = "jsonl") -> Operation[bytes]:  # noqa: A002 the name of the parameter of the API
        """Return all messages as JSON Lines, or as `markdown`."""
        request = Request("GET", _of(conversation_id, "export"), {"format": format})
        return (yield from exchange.send(request, self.retries)).content

    @operation
    def delete_conversation(self, conversation_id: str) -> Operation[DeletionProof]:
        """Delete a conversation for real, with what stems from it, and return what a search finds afterwards."""
        request = Request("DELETE", _of(conversation_id))
        return DeletionProof.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def delete_user(self, user: str, *, namespace: str | None = None) -> Operation[DeletionProof]:
        """Delete everything of a user for real, and return what a search finds afterwards."""
        request = Request("DELETE", f"/v1/users/{quote(user, safe='')}/memory", {"namespace": namespace})
        return DeletionProof.model_validate((yield from exchange.send_json(request, self.retries)))


def _of(conversation_id: str, *more: str) -> str:
    return "/".join(("/v1/conversations", quote(conversation_id, safe=""), *more))
