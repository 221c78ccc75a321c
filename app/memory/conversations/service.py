"""
Conversations: create, read, append, delete.

Messages that are appended together stay together, whoever else appends at the same time.
A conversation of another namespace is as unknown as one that never was.
Who locks a run and a conversation in one transaction locks the run first.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from app.files.file import parsed_id, shown_id
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations import store
from app.memory.conversations.conversation import (
    CONVERSATION_PREFIX,
    ConversationFull,
    NewConversation,
    StoredConversation,
)
from app.memory.conversations.message import NewMessage, StoredMessage
from app.memory.conversations.store import END


class Conversations:
    """The conversations of all namespaces."""

    def __init__(self, database: Database, settings: ConversationSettings) -> None:
        self._database = database
        #: The settings of this moment; replaced when they change.
        self.settings = settings

    def create(self, new: NewConversation, messages: Sequence[NewMessage] = ()) -> StoredConversation:
        """Write a conversation, with its first messages. Raises InvalidInput, ConversationFull."""
        with self._database.work() as work:
            return self.create_in(work, new, messages)

    def create_in(
        self, work: UnitOfWork, new: NewConversation, messages: Sequence[NewMessage] = ()
    ) -> StoredConversation:
        """As `create`, in a transaction of the caller."""
        made = store.insert(work, new)
        if messages:
            self.append_in(work, made.id, messages)
            return self.get_in(work, made.id, None)
        return made

    def get(self, id_: UUID | None, namespace: str | None, shown: str = "") -> StoredConversation:
        """Return a conversation of a namespace, or of any. Raises NotFound, which names it as `shown`."""
        with self._database.work() as work:
            return self.get_in(work, id_, namespace, shown)

    def get_in(
        self, work: UnitOfWork, id_: UUID | None, namespace: str | None, shown: str = "", *, lock: bool = False
    ) -> StoredConversation:
        """As `get`, in a transaction. With `lock`, nobody appends before its end."""
        found = None if id_ is None else store.find(work, id_, lock=lock)
        if found is None or (namespace is not None and found.namespace != namespace):
            raise NotFound("conversation", shown or ("" if id_ is None else shown_conversation(id_)))
        return found

    def read(
        self, id_: UUID, *, first: int = 1, end: int = END, limit: int = 100, newest_first: bool = False
    ) -> list[StoredMessage]:
        """Return messages from the place `first` on and before `end`; none of a conversation that is not there."""
        with self._database.work() as work:
            return store.read(work, id_, first=first, end=end, limit=limit, newest_first=newest_first)

    def append(
        self, id_: UUID | None, namespace: str | None, messages: Sequence[NewMessage], shown: str = ""
    ) -> list[StoredMessage]:
        """Append messages next to each other. Raises NotFound, InvalidInput, ConversationFull."""
        with self._database.work() as work:
            found = self.get_in(work, id_, namespace, shown)
            return self.append_in(work, found.id, messages)

    def append_in(self, work: UnitOfWork, id_: UUID, messages: Sequence[NewMessage]) -> list[StoredMessage]:
        """
        As `append`, in a transaction of the caller, who has checked the namespace.

        The conversation is locked until its end. Raises NotFound when it is not there, InvalidInput, ConversationFull.
        """
        self._require_sizes(messages)
        if not messages:
            return []
        stored = store.append(work, id_, messages, self.settings.max_messages)
        if stored is None:
            self.get_in(work, id_, None)
            raise ConversationFull(shown_conversation(id_), self.settings.max_messages)
        return stored

    def _require_sizes(self, messages: Sequence[NewMessage]) -> None:
        limit = self.settings.max_message_bytes
        for place, message in enumerate(messages):
            if message.size > limit:
                raise InvalidInput(
                    [
                        Problem(
                            f"items[{place}]",
                            f"the message has {message.size} bytes",
                            f"at most {limit} (setting conversations.max_message_bytes)",
                        )
                    ],
                    "request",
                )


def shown_conversation(id_: UUID) -> str:
    """Return the id of a conversation as the API shows it."""
    return shown_id(id_, CONVERSATION_PREFIX)


def parsed_conversation(text: str) -> UUID | None:
    """Return the id of a conversation that a text shows, or None."""
    return parsed_id(text, CONVERSATION_PREFIX)
