"""
The conversation of an agent: its last messages come before the prompt, and the prompt and the answer are appended.

They are appended when the agent has ended, once: a decision that is made again finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import text

from app.inference.requests import ChatMessage
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, DatabaseUnreachable, FailureReason, NotFound, StepFailure
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations.chat import chat_messages
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations, parsed_conversation
from workers.memory import run_links

#: Most earlier messages that an agent sees.
WINDOW = 40
_APPENDED = text(
    "SELECT 1 FROM conversation_message WHERE conversation_id = :id AND run_id = :run_id AND step_key = :key"
)


def before(
    database: Database, settings: ConversationSettings, shown: str, namespace: str, run_id: UUID
) -> list[ChatMessage]:
    """
    Return the last messages of a conversation, from one of the user on. The run is noted as one of its runs.

    Raises StepFailure.
    """
    service = Conversations(database, settings)
    try:
        found = service.get(parsed_conversation(shown), namespace, shown)
    except NotFound as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from error
    # Also if the agent fails and appends nothing: its record has these messages.
    run_links.link(database, run_id, [found.id])
    messages = chat_messages(service.read(found.id, limit=WINDOW, newest_first=True)[::-1])
    first = next((at for at, message in enumerate(messages) if message.role == "user"), len(messages))
    return messages[first:]


def append(
    database: Database,
    settings: ConversationSettings,
    shown: str,
    namespace: str,
    said: Sequence[ChatMessage],
    *,
    model: str | None,
    run_id: UUID,
    key: str,
) -> None:
    """Append the prompt and the answer, unless that was done. Raises StepFailure."""
    service = Conversations(database, settings)
    new = [
        NewMessage(
            MessageRole(one.role),
            one.content,
            model=model if one.role == "assistant" else None,
            run_id=run_id,
            step_key=key,
        )
        for one in said
    ]
    try:
        with database.work() as work:
            found = service.get_in(work, parsed_conversation(shown), namespace, shown, lock=True)
            if work.row(_APPENDED, {"id": found.id, "run_id": run_id, "key": key}) is None:
                service.append_in(work, found.id, new)
    except DatabaseUnreachable:
        raise
    except ArrieroError as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, f"the answer cannot be appended: {error}") from error
