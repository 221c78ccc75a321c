"""
Conversations that calls continue: found before the call is sent, so that a wrong id is an error at once.

The pool reads the conversation again when it puts the prompt together.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from app.access import namespaces
from app.access.callers import Caller
from app.api import threads
from app.api.services import Services
from app.inference.openai.chat import FunctionCallIn, MessageIn, ToolCallIn
from app.inference.openai.responses.request import MAX_MESSAGES
from app.kernel.errors import InvalidInput, Problem
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.message import StoredMessage
from app.memory.conversations.service import Conversations, parsed_conversation


async def require(services: Services, caller: Caller, id_: str | None, user: str | None, where: str) -> None:
    """
    Refuse a conversation that the call cannot continue; the field `where` names it.

    Raises NotFound unless it is one of the caller's namespace, and InvalidInput for another user.
    """
    if id_ is None:
        return
    found = await threads.run_for_request(_found, services, caller, id_, where)
    if user is not None and found.user is not None and found.user != user:
        problem = Problem("user", f"the conversation {id_} belongs to another user", f"{found.user!r}, or no user")
        raise InvalidInput([problem], "request")


async def messages_upto(services: Services, caller: Caller, id_: str, run_id: UUID) -> list[MessageIn]:
    """
    Return the messages of a conversation up to those that a run has appended.

    Raises NotFound for the conversation, InvalidInput when the run has appended none, or there are too many.
    """
    return await threads.run_for_request(_messages_upto, services, caller, id_, run_id)


def _found(services: Services, caller: Caller, id_: str, where: str) -> StoredConversation:
    namespace = caller.namespace_of(caller.labels({}))
    return _service(services).get(parsed_conversation(id_), namespace or namespaces.DEFAULT, id_[:100], where=where)


def _messages_upto(services: Services, caller: Caller, id_: str, run_id: UUID) -> list[MessageIn]:
    found = _found(services, caller, id_, "previous_response_id")
    read: list[StoredMessage] = _service(services).read(found.id, limit=MAX_MESSAGES)
    last = max((message.seq for message in read if message.run_id == run_id), default=None)
    if last is None:
        problem = Problem(
            "previous_response_id",
            f"the messages of that response are not among the first {MAX_MESSAGES} of the conversation {id_}",
            f"conversation: {id_}",
        )
        raise InvalidInput([problem], "request")
    return _chat([message for message in read if message.seq <= last])


def _chat(messages: Sequence[StoredMessage]) -> list[MessageIn]:
    return [
        MessageIn(
            role=message.role.value,
            content=message.content or (None if message.calls else ""),
            tool_calls=[
                ToolCallIn(id=call.id, function=FunctionCallIn(name=call.name, arguments=call.arguments))
                for call in message.calls
            ]
            or None,
            tool_call_id=message.call_id,
        )
        for message in messages
    ]


def _service(services: Services) -> Conversations:
    return Conversations(services.database, services.settings.conversations)
