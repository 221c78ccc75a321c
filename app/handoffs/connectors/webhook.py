"""The source `webhook`: web hooks that are signed as Standard Webhooks says, and de-duplicated by `webhook-id`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import Field

from app.handoffs.connectors.connector import (
    MAX_KEY,
    ExpressionText,
    InboundMessage,
    NotGenuine,
    ReceivedRequest,
    RevealSecret,
    SecretName,
    SourceFields,
    json_message,
)
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security import webhook_signatures
from app.kernel.security.webhook_signatures import UnusableSecret, WrongSignature
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class WebhookSource(SourceFields):
    """Web hooks: https://www.standardwebhooks.com."""

    kind: Literal["webhook"]
    #: The secret that signs: `whsec_` and base64, or any text of at least 24 characters.
    secret: SecretName
    #: How old a message may be, and how far its sender's clock may be ahead.
    tolerance: Annotated[Duration, durations.at_least("1s"), Field(le=timedelta(days=1))] = timedelta(minutes=5)
    #: The key by which a message is known again, instead of `webhook-id`.
    key: ExpressionText | None = None
    #: Who sent a message.
    sender: ExpressionText | None = None

    def receive(self, request: ReceivedRequest, reveal: RevealSecret, now: datetime) -> list[InboundMessage]:
        """Return the message of a request. Raises NotGenuine, InvalidInput."""
        headers = request.headers
        id_ = headers.get("webhook-id", "")
        try:
            webhook_signatures.verify(
                reveal(self.secret),
                id_,
                headers.get("webhook-timestamp", ""),
                headers.get("webhook-signature", ""),
                request.body,
                now,
                self.tolerance,
            )
        except (WrongSignature, UnusableSecret) as error:
            raise NotGenuine(str(error)) from None
        if len(id_) > MAX_KEY:
            raise InvalidInput(
                [Problem("webhook-id", f"it has {len(id_)} characters", f"at most {MAX_KEY}")], "message"
            )
        return [InboundMessage(id_, "", json_message(request))]

    def expressions(self) -> Mapping[str, str]:
        """Return the expressions of the fields `key` and `sender`."""
        return {name: text for name in ("key", "sender") if (text := getattr(self, name)) is not None}
