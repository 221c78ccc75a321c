"""The source `api`: messages that callers with an API key submit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from app.handoffs.connectors.connector import (
    ExpressionText,
    InboundMessage,
    NotGenuine,
    ReceivedRequest,
    RevealSecret,
    SourceFields,
    json_message,
)


class SubmissionSource(SourceFields):
    """Messages of `POST /v1/handoffs/NAME/messages`. Its other address refuses all."""

    kind: Literal["api"]
    #: The key by which a message is known again; without it, that of the caller, or the hash of the message.
    key: ExpressionText | None = None
    #: Who sent a message.
    sender: ExpressionText | None = None

    def receive(self, request: ReceivedRequest, reveal: RevealSecret, now: datetime) -> list[InboundMessage]:
        """Refuse: such messages need an API key."""
        del request, reveal, now
        raise NotGenuine("messages of this hand-off are submitted with an API key")

    def expressions(self) -> Mapping[str, str]:
        """Return the expressions of the fields `key` and `sender`."""
        return {name: text for name in ("key", "sender") if (text := getattr(self, name)) is not None}


def submitted(request: ReceivedRequest) -> list[InboundMessage]:
    """Return the message of a request of a known caller. Raises InvalidInput."""
    return [InboundMessage(hashlib.sha256(request.body).hexdigest(), "", json_message(request))]
