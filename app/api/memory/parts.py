"""What the resources of conversations share: their services, and the places of messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

from app.access.callers import Caller
from app.api.services import InjectedServices, Services
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.memory.conversations import items
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.hot import HotConversations
from app.memory.conversations.service import Conversations, parsed_conversation


@dataclass(frozen=True, slots=True)
class ConversationServices:
    """The services of conversations, with the settings of this moment."""

    conversations: Conversations
    hot: HotConversations

    @staticmethod
    def of(services: Services) -> ConversationServices:
        """Return them for the services of the process."""
        settings = services.settings.conversations
        return ConversationServices(
            Conversations(services.database, settings),
            HotConversations(services.database, services.publisher, settings),
        )

    def get(self, shown: str, caller: Caller) -> StoredConversation:
        """Return a conversation of the caller. Raises NotFound."""
        return self.conversations.get(parsed_conversation(shown), caller.namespace, shown[:100])


async def _of_process(services: InjectedServices) -> ConversationServices:
    return ConversationServices.of(services)


#: The type of an endpoint's argument that receives these services.
Conversing = Annotated[ConversationServices, Depends(_of_process)]


def message_at(conversations: Conversations, conversation: StoredConversation, given: str | int, where: str) -> int:
    """
    Return the place of a message that a client names by its id or its number.

    Raises NotFound, and InvalidInput for a number that no message has had.
    """
    if isinstance(given, int) or (given.isascii() and given.isdigit() and len(given) < 18):
        seq = int(given)
        if not 1 <= seq < conversation.next_seq:
            accepted = f"1 to {conversation.next_seq - 1}, or the id of a message"
            raise InvalidInput([Problem(where, f"there is no message {seq}", accepted)], "request")
        return seq
    place = items.place_of(given)
    if place is None:
        raise NotFound("message", given[:100])
    return conversations.message(conversation.id, place.message_id, given[:100]).seq
