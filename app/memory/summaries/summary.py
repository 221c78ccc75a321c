"""
Summaries of conversations, as values.

A summary covers a conversation from its beginning up to a turn. It is made of the summary before it and of the messages
since; each keeps its source range and its predecessor, and none is ever changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

#: The prefix of the ids of summaries.
SUMMARY_PREFIX = "sum_"


@dataclass(frozen=True, slots=True)
class NewSummary:
    """A summary that is to be stored."""

    conversation_id: UUID
    #: The `revision` of the conversation whose messages it was made of.
    revision: int
    #: The places of the first and the last message that were read for it, beside the summary before.
    first_seq: int
    upto_seq: int
    previous_id: UUID | None
    model: str
    text: str
    #: By the tokenizer of `model`.
    tokens: int
    #: Sentences that were removed because their source does not have what they say.
    sentences_removed: int = 0
    #: Identifiers that the model left out: added, and without room.
    identifiers_added: int = 0
    identifiers_missing: int = 0
    run_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class StoredSummary:
    """A summary. Its fields are those of `NewSummary`."""

    id: UUID
    conversation_id: UUID
    revision: int
    first_seq: int
    upto_seq: int
    previous_id: UUID | None
    model: str
    text: str
    tokens: int
    sentences_removed: int
    identifiers_added: int
    identifiers_missing: int
    run_id: UUID | None
    created_at: datetime
