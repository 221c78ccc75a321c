"""The items of a conversation in OpenAI's form, and its messages in the form of chat completions."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import Header, Query

from app.access.callers import KeyScope
from app.api import bodies
from app.api.callers import InjectedCaller, requires
from app.api.memory.documents import (
    ConversationOut,
    ItemListOut,
    ItemsIn,
    MessageListOut,
    MessagesIn,
    item_list,
    message_list,
    out,
)
from app.api.memory.parts import ConversationServices, Conversing, message_at
from app.api.openai import errors
from app.api.openai.errors import OpenAIRoute
from app.api.routers import ApiRouter
from app.kernel.errors import BrokerUnreachable, Conflict, InvalidInput, NotFound, Problem
from app.memory.conversations import items
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.items import ItemPlace
from app.memory.conversations.message import StoredMessage
from app.memory.conversations.service import parsed_conversation
from app.memory.conversations.store import END

router = ApiRouter(
    prefix="/v1/conversations/{conversation_id}",
    tags=["openai"],
    dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)],
    route_class=OpenAIRoute,
)

_Order = Literal["asc", "desc"]
_Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200)]
_Limit = Annotated[int, Query(ge=1, le=100)]
_AppendErrors = errors.documented(400, 404, 409, 413, 415, 503)


@router.post(
    "/items",
    summary="Append items",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=_AppendErrors,
    openapi_extra=bodies.documented_as(ItemsIn),
)
def append_items(
    conversation_id: str,
    conversing: Conversing,
    caller: InjectedCaller,
    body: Annotated[ItemsIn, bodies.of(ItemsIn)],
    key: _Key = None,
) -> ItemListOut:
    """
    Append items, next to each other: nothing that others append comes between them.

    The same `Idempotency-Key` with the same items appends them once.
    """
    new = [message for item in body.items if (message := items.message_of(item)) is not None]
    if not new:
        raise InvalidInput([Problem("items", "nothing here is kept", "messages, calls and their outputs")], "request")
    id_ = parsed_conversation(conversation_id)
    stored = conversing.conversations.append(id_, caller.namespace, new, conversation_id[:100], key=key)
    return item_list(items.items_of(stored), has_more=False)


@router.get("/items", summary="Items of a conversation", responses=errors.documented(400, 404, 503))
def list_items(
    conversation_id: str,
    conversing: Conversing,
    caller: InjectedCaller,
    limit: _Limit = 20,
    order: _Order = "desc",
    after: Annotated[str | None, Query(description="the id of the last item of the part before")] = None,
    include: Annotated[list[str] | None, Query(description="without effect here")] = None,  # noqa: ARG001 OpenAI's
) -> ItemListOut:
    """The items of a conversation, the newest first."""
    found = conversing.get(conversation_id, caller)
    newest_first = order == "desc"
    if after is not None and items.place_of(after) is None:
        raise NotFound("item", after[:100])
    read = _read(conversing, found, _seq(conversing, found, after), limit + 1, newest_first, inclusive=True)
    data = items.items_of(read if not newest_first else read[::-1])
    data = data[::-1] if newest_first else data
    if after is not None:
        # The message of that item may have others, which come after it.
        place = next((at for at, item in enumerate(data) if item["id"] == after), -1)
        data = data[place + 1 :]
    return item_list(data[:limit], has_more=len(data) > limit)


@router.get("/items/{item_id}", summary="An item of a conversation", responses=errors.documented(404, 503))
def get_item(
    conversation_id: str,
    item_id: str,
    conversing: Conversing,
    caller: InjectedCaller,
    include: Annotated[list[str] | None, Query(description="without effect here")] = None,  # noqa: ARG001 OpenAI's
) -> dict[str, Any]:
    """An item, in OpenAI's form."""
    _, place, message = _message_of(conversing, conversing.get(conversation_id, caller), item_id)
    item = items.item_at(message, place)
    if item is None:
        raise NotFound("item", item_id[:100])
    return item


@router.delete(
    "/items/{item_id}",
    summary="Delete an item",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=errors.documented(404, 409, 503),
)
def delete_item(conversation_id: str, item_id: str, conversing: Conversing, caller: InjectedCaller) -> ConversationOut:
    """Delete an item, and what was derived from it. Its number stays empty; a call goes with its whole message."""
    found, place, message = _message_of(conversing, conversing.get(conversation_id, caller), item_id)
    if place.call is not None and len(items.items_of([message])) > 1:
        whole = items.items_of([message])[0]["id"]
        raise Conflict(f"the call {item_id} is a part of a message with others; delete that: {whole}")
    changed = conversing.conversations.remove_message(found.id, message.id, item_id[:100])
    # Without it, what is kept there holds for the revision before, and expires.
    with suppress(BrokerUnreachable):
        conversing.hot.forget([found.id], changed.revision)
    return out(changed)


@router.post(
    "/messages",
    summary="Append messages",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=_AppendErrors,
    openapi_extra=bodies.documented_as(MessagesIn),
)
def append_messages(
    conversation_id: str,
    conversing: Conversing,
    caller: InjectedCaller,
    body: Annotated[MessagesIn, bodies.of(MessagesIn)],
    key: _Key = None,
) -> MessageListOut:
    """
    Append messages in the form of chat completions, next to each other.

    The same `Idempotency-Key` with the same messages appends them once.
    """
    new = [message.message() for message in body.messages]
    id_ = parsed_conversation(conversation_id)
    stored = conversing.conversations.append(id_, caller.namespace, new, conversation_id[:100], key=key)
    return message_list(stored, has_more=False)


@router.get("/messages", summary="Messages of a conversation", responses=errors.documented(400, 404, 503))
def list_messages(
    conversation_id: str,
    conversing: Conversing,
    caller: InjectedCaller,
    limit: _Limit = 20,
    order: _Order = "asc",
    after: Annotated[str | None, Query(description="the id or number of the last one of the part before")] = None,
) -> MessageListOut:
    """The messages of a conversation, the oldest first."""
    found = conversing.get(conversation_id, caller)
    read = _read(conversing, found, _seq(conversing, found, after), limit + 1, order == "desc")
    return message_list(read[:limit], has_more=len(read) > limit)


def _seq(conversing: ConversationServices, found: StoredConversation, after: str | None) -> int | None:
    return None if after is None else message_at(conversing.conversations, found, after, "query.after")


def _read(
    conversing: ConversationServices,
    found: StoredConversation,
    after: int | None,
    limit: int,
    newest_first: bool,
    *,
    inclusive: bool = False,
) -> list[StoredMessage]:
    """Messages after a place in this order; with `inclusive`, that one too."""
    own = 1 if inclusive and after is not None else 0
    if newest_first and after is None:
        return conversing.hot.recent(found, limit)[::-1]
    if newest_first:
        assert after is not None
        return conversing.conversations.read(found.id, end=after + own, limit=limit + own, newest_first=True)
    first = 1 if after is None else after + 1 - own
    return conversing.conversations.read(found.id, first=first, end=END, limit=limit + own)


def _message_of(
    conversing: ConversationServices, found: StoredConversation, item_id: str
) -> tuple[StoredConversation, ItemPlace, StoredMessage]:
    place = items.place_of(item_id)
    if place is None:
        raise NotFound("item", item_id[:100])
    return found, place, conversing.conversations.message(found.id, place.message_id, item_id[:100])
