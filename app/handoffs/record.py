"""
The record of a message: its states, and the stages that it has been through.

    received  → delivering, invalid, failed, skipped
    delivering → delivered, failed
    invalid, failed → received        a person sends it again, as it is or mended
    delivered → received              a person replays it

Nothing is dropped: each message that was accepted is in one of these states until its retention is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from app.kernel.errors import Conflict


class MessageState(StrEnum):
    """Where a message is."""

    RECEIVED = "received"
    DELIVERING = "delivering"
    DELIVERED = "delivered"
    #: It, or its payload, does not conform to its schema; a person may mend it.
    INVALID = "invalid"
    #: Its run failed, or could not be submitted.
    FAILED = "failed"
    #: There is nothing to hand on, with the reason.
    SKIPPED = "skipped"


class HandoffStage(StrEnum):
    """What is done with a message, in order."""

    AUTHENTICATE = "authenticate"
    VALIDATE = "validate"
    DEDUPLICATE = "deduplicate"
    TRANSFORM = "transform"
    DELIVER = "deliver"
    CONFIRM = "confirm"
    #: An answer was sent, or could not be.
    ANSWER = "answer"
    #: A person sent it again.
    RESEND = "resend"


#: The states from which a person can send a message again.
RESENDABLE = frozenset({MessageState.INVALID, MessageState.FAILED, MessageState.DELIVERED})
#: The states that count, and whether as a success.
COUNTED: Mapping[MessageState, bool] = {
    MessageState.DELIVERED: True,
    MessageState.INVALID: False,
    MessageState.FAILED: False,
}
#: Most times that a message is sent.
MAX_SENDINGS = 100


@dataclass(frozen=True, slots=True)
class HandoffMessage:
    """A message, as it is stored."""

    id: UUID
    namespace: str
    handoff: str
    #: The version of the document that is used.
    version: int
    key: str
    sender: str
    state: str
    message: dict[str, Any]
    #: What is delivered; None before it is known.
    payload: dict[str, Any] | None
    #: Why it is invalid or failed: objects with `where`, `message` and `accepted`.
    problems: list[dict[str, str]]
    #: Objects with `stage`, `at` and `detail`.
    stages: list[dict[str, str]]
    run_id: UUID | None
    #: Counts how often it was sent.
    sending: int
    #: Deliveries of the same message after the first.
    duplicates: int
    #: How often a worker took it since it was sent.
    takes: int
    accuracy: float | None
    completeness: float | None
    timeliness: float | None
    received_at: datetime
    finished_at: datetime | None


def require_resendable(message: HandoffMessage) -> None:
    """Raise Conflict unless a person can send it again."""
    if message.state not in RESENDABLE:
        accepted = ", ".join(sorted(RESENDABLE))
        raise Conflict(f"message {message.id} is {message.state}; it can be sent again when it is {accepted}")
    if message.sending >= MAX_SENDINGS:
        raise Conflict(f"message {message.id} was sent {message.sending} times; that is the most")
