"""
Conversations: create, read, append, delete.

Messages that are appended together stay together, whoever else appends at the same time.
A conversation of another namespace is as unknown as one that never was.
Who locks a run and a conversation in one transaction locks the run first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid5

from app.files.file import parsed_id, shown_id
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations import lists, store
from app.memory.conversations.conversation import (
    CONVERSATION_PREFIX,
    ConversationFull,
    NewConversation,
    StoredConversation,
)
from app.memory.conversations.lists import ConversationFilter, ConversationPage
from app.memory.conversations.message import MESSAGE_PREFIX, MessageRole, NewMessage, StoredMessage
from app.memory.conversations.store import END
from app.memory.recall import storage as passages
from app.memory.recall.passages import NewPassage, SourceKind
from app.memory.summaries import store as summaries

#: Roles whose messages are not said but given.
_INSTRUCTIONS = (MessageRole.SYSTEM, MessageRole.DEVELOPER)
#: Messages of a fork that are written at a time.
_PART = 500


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

    def get(self, id_: UUID | None, namespace: str | None, shown: str = "", *, where: str = "") -> StoredConversation:
        """Return a conversation of a namespace, or of any. Raises NotFound, which names it as `shown`, in `where`."""
        with self._database.work() as work:
            return self.get_in(work, id_, namespace, shown, where=where)

    def get_in(
        self,
        work: UnitOfWork,
        id_: UUID | None,
        namespace: str | None,
        shown: str = "",
        *,
        lock: bool = False,
        where: str = "",
    ) -> StoredConversation:
        """As `get`, in a transaction. With `lock`, nobody appends before its end."""
        found = None if id_ is None else store.find(work, id_, lock=lock)
        if found is None or (namespace is not None and found.namespace != namespace):
            raise NotFound("conversation", shown or ("" if id_ is None else shown_conversation(id_)), where=where)
        return found

    def read(
        self, id_: UUID, *, first: int = 1, end: int = END, limit: int = 100, newest_first: bool = False
    ) -> list[StoredMessage]:
        """Return messages from the place `first` on and before `end`; none of a conversation that is not there."""
        with self._database.work() as work:
            return store.read(work, id_, first=first, end=end, limit=limit, newest_first=newest_first)

    def append(
        self,
        id_: UUID | None,
        namespace: str | None,
        messages: Sequence[NewMessage],
        shown: str = "",
        *,
        key: str | None = None,
    ) -> list[StoredMessage]:
        """
        Append messages next to each other. The same `key` with the same messages appends them once.

        Raises NotFound, InvalidInput, ConversationFull, and Conflict for a key that came with other messages.
        """
        with self._database.work() as work:
            found = self.get_in(work, id_, namespace, shown, lock=key is not None)
            if key is None:
                return self.append_in(work, found.id, messages)
            ids_ = [uuid5(found.id, f"{key}:{place}") for place in range(len(messages))]
            before = store.find_message(work, ids_[0]) if ids_ else None
            if before is None:
                return self.append_in(work, found.id, messages, ids_)
            stored = store.read(work, found.id, first=before.seq, limit=len(ids_))
            more = store.find_message(work, uuid5(found.id, f"{key}:{len(ids_)}"))
            if (
                more is not None
                or [one.id for one in stored] != ids_
                or [_said(one) for one in stored] != [_said(one) for one in messages]
            ):
                raise Conflict("the idempotency key was used for other messages; append these under another one")
            return stored

    def append_in(
        self, work: UnitOfWork, id_: UUID, messages: Sequence[NewMessage], ids_: Sequence[UUID] = ()
    ) -> list[StoredMessage]:
        """
        As `append`, in a transaction of the caller, who has checked the namespace. Without `ids_`, ids are new.

        The conversation is locked until its end. Raises NotFound when it is not there, InvalidInput, ConversationFull.
        """
        self._require_sizes(messages)
        if not messages:
            return []
        stored = store.append(work, id_, messages, self.settings.max_messages, ids_)
        if stored is None:
            self.get_in(work, id_, None)
            raise ConversationFull(shown_conversation(id_), self.settings.max_messages)
        found = self.get_in(work, id_, None)
        passages.put_in(work, passages_of(found, stored))
        return stored

    def link_run(self, id_: UUID, run_id: UUID) -> None:
        """Note that a run holds texts of a conversation, also if it appends nothing: a deletion takes it along."""
        with self._database.work() as work:
            store.link_runs(work, id_, {run_id})

    def page(
        self, wanted: ConversationFilter, *, after: UUID | None = None, limit: int = 20, newest_first: bool = True
    ) -> ConversationPage:
        """Return conversations in the order of their creation, after one of them."""
        with self._database.work() as work:
            return lists.page(work, wanted, after=after, limit=limit, newest_first=newest_first)

    def update(
        self, id_: UUID | None, namespace: str | None, given: Mapping[str, Any], shown: str = ""
    ) -> StoredConversation:
        """Change those of `title`, `metadata`, `model` and `retention` that are given. Raises NotFound."""
        with self._database.work() as work:
            found = self.get_in(work, id_, namespace, shown, lock=True)
            changed = store.update(work, found.id, given)
            assert changed is not None, "it is locked"
            return changed

    def fork(
        self,
        id_: UUID | None,
        namespace: str | None,
        last: int | None = None,
        *,
        title: str | None = None,
        metadata: Mapping[str, str] | None = None,
        shown: str = "",
    ) -> StoredConversation:
        """
        Return a new conversation with the messages up to the place `last`, or all of them.

        It has the user, the model and the retention of the first one. Raises NotFound, InvalidInput.
        """
        with self._database.work() as work:
            found = self.get_in(work, id_, namespace, shown, lock=True)
            last = found.next_seq - 1 if last is None else last
            if last >= found.next_seq:
                accepted = f"at most {found.next_seq - 1}, the last message"
                raise InvalidInput([Problem("at", f"there is no message {last}", accepted)], "request")
            new = NewConversation(
                found.namespace,
                found.user,
                found.title if title is None else title,
                found.metadata if metadata is None else metadata,
                found.model,
                found.retention,
            )
            made = store.copy(work, found.id, last, store.insert(work, new, found.id, last).id)
            first = 1
            while copied := store.read(work, made.id, first=first, limit=_PART):
                passages.put_in(work, passages_of(made, copied))
                first = copied[-1].seq + 1
            return made

    def message(self, conversation_id: UUID, id_: UUID | None, shown: str = "") -> StoredMessage:
        """Return a message of a conversation. Raises NotFound."""
        with self._database.work() as work:
            return self.message_in(work, conversation_id, id_, shown)

    def message_in(self, work: UnitOfWork, conversation_id: UUID, id_: UUID | None, shown: str = "") -> StoredMessage:
        """As `message`, in a transaction."""
        found = None if id_ is None else store.find_message(work, id_)
        if found is None or found.conversation_id != conversation_id:
            raise NotFound("message", shown or ("" if id_ is None else shown_id(id_, MESSAGE_PREFIX)))
        return found

    def remove_message(self, id_: UUID, message_id: UUID | None, shown: str = "") -> StoredConversation:
        """Delete one message; its place stays empty. Raises NotFound."""
        with self._database.work() as work:
            conversation = self.get_in(work, id_, None, lock=True)
            found = self.message_in(work, id_, message_id, shown)
            store.remove_message(work, id_, found.seq)
            summaries.forget_in(work, id_)
            shown_ids = [shown_id(found.id, MESSAGE_PREFIX)]
            passages.remove_in(work, conversation.namespace, SourceKind.MESSAGE, shown_ids)
            return self.get_in(work, id_, None)

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


def _said(message: NewMessage | StoredMessage) -> tuple[object, ...]:
    return message.role, message.content, message.speaker, message.calls, message.call_id


def passages_of(conversation: StoredConversation, messages: Sequence[StoredMessage]) -> list[NewPassage]:
    """Return what of the messages can be recalled: what users, models and tools have said, not instructions."""
    return [
        NewPassage(
            conversation.namespace,
            SourceKind.MESSAGE,
            shown_id(message.id, MESSAGE_PREFIX),
            message.content,
            user=conversation.user,
            conversation=shown_conversation(conversation.id),
            position=message.seq,
            role=message.role.value,
            speaker=message.speaker,
            at=message.created_at,
        )
        for message in messages
        if message.content and message.role not in _INSTRUCTIONS
    ]


def shown_conversation(id_: UUID) -> str:
    """Return the id of a conversation as the API shows it."""
    return shown_id(id_, CONVERSATION_PREFIX)


def parsed_conversation(text: str) -> UUID | None:
    """Return the id of a conversation that a text shows, or None."""
    return parsed_id(text, CONVERSATION_PREFIX)
