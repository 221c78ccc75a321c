"""
Messages as items of OpenAI's API, and back.

A message with text and tool calls is several items: its text has the id of the message, and each call an id of its own,
`fc_` with the number of the call. An item that a client appends is one message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app.files.file import parsed_id, shown_id
from app.inference.openai.responses.items import CallItem, CallOutputItem, InputItem, InputPart, MessageItem
from app.memory.conversations.message import MESSAGE_PREFIX, MessageRole, NewMessage, StoredCall, StoredMessage

#: The ids of tool calls: that of their message, and their number in it.
_CALL_ID = re.compile(r"fc_([0-9a-f]{32})_([0-9]{1,3})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ItemPlace:
    """What the id of an item names."""

    message_id: UUID
    #: The number of the call in the message; None for the message itself.
    call: int | None = None


def place_of(id_: str) -> ItemPlace | None:
    """Return what the id of an item names; None for what is no such id."""
    found = _CALL_ID.fullmatch(id_)
    if found is not None:
        return ItemPlace(UUID(found[1]), int(found[2]))
    message_id = parsed_id(id_, MESSAGE_PREFIX)
    return None if message_id is None else ItemPlace(message_id)


def message_of(item: InputItem) -> NewMessage | None:
    """Return the message of an item; None for one without content for a model, such as reasoning."""
    match item:
        case MessageItem():
            return NewMessage(MessageRole(item.role), _text(item.content))
        case CallItem():
            return NewMessage(MessageRole.ASSISTANT, calls=(StoredCall(item.call_id, item.name, item.arguments),))
        case CallOutputItem():
            return NewMessage(MessageRole.TOOL, _text(item.output), call_id=item.call_id)
        case _:
            return None


def items_of(messages: Iterable[StoredMessage]) -> list[dict[str, Any]]:
    """Return the items of messages, in their order."""
    return [item for message in messages for item in _items(message)]


def item_at(message: StoredMessage, place: ItemPlace) -> dict[str, Any] | None:
    """Return the item of a message at a place; None when it has no such call."""
    found = _items(message)
    if place.call is None:
        return found[0]
    return next((item for item in found if item["id"] == _call_id(message, place.call)), None)


def _items(message: StoredMessage) -> list[dict[str, Any]]:
    origin = _origin(message)
    if message.role is MessageRole.TOOL:
        output = {"call_id": message.call_id or "", "output": message.content, "status": "completed"}
        return [{"id": _id(message), "type": "function_call_output", **output, **origin}]
    found: list[dict[str, Any]] = []
    if message.content or not message.calls:
        written = message.role is MessageRole.ASSISTANT
        part: dict[str, Any] = {"type": "output_text" if written else "input_text", "text": message.content}
        if written:
            part |= {"annotations": [], "logprobs": []}
        said = {"role": message.role.value, "status": "completed", "content": [part]}
        found.append({"id": _id(message), "type": "message", **said, **origin})
    for number, call in enumerate(message.calls):
        called = {"call_id": call.id, "name": call.name, "arguments": call.arguments, "status": "completed"}
        found.append({"id": _call_id(message, number), "type": "function_call", **called, **origin})
    return found


def _origin(message: StoredMessage) -> Mapping[str, Any]:
    """What Arriero adds: the place and the time of the message, and where it is from, as far as that is known."""
    known = {
        "speaker": message.speaker,
        "model": message.model,
        "tokens": message.tokens,
        "run_id": None if message.run_id is None else str(message.run_id),
        "step": message.step_key,
    }
    added = {name: value for name, value in known.items() if value is not None}
    return {"seq": message.seq, "created_at": int(message.created_at.timestamp()), **added}


def _id(message: StoredMessage) -> str:
    return shown_id(message.id, MESSAGE_PREFIX)


def _call_id(message: StoredMessage, number: int) -> str:
    return f"fc_{message.id.hex}_{number}"


def _text(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.written or "" for part in content)
