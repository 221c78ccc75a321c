"""
The source `whatsapp`: web hooks of Meta's WhatsApp Cloud API.

Meta verifies the address by a GET with `verify_token`, and signs each request with the secret of the app
(`X-Hub-Signature-256`). A request can hold many messages and statuses; Meta sends it again until it gets a 2xx, and in
any order. A message is known by its id, a status by the id of its message and its name.
Source of the shapes: https://developers.facebook.com/docs/whatsapp/cloud-api/webhooks/payload-examples.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from app.handoffs.connectors.connector import (
    MAX_KEY,
    MAX_SENDER,
    AddressQuestion,
    InboundMessage,
    NotGenuine,
    ReceivedRequest,
    RevealSecret,
    SecretName,
    SourceFields,
    json_message,
)
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security import texts

#: Most messages and statuses of a request; Meta sends up to a thousand.
MAX_PER_REQUEST = 1_000
#: Most characters of a text, most parts of a list.
_MAX_TEXT, _MAX_PARTS = 8_000, 50
_OBJECT = "whatsapp_business_account"
_MEDIA = ("image", "audio", "video", "document", "sticker")
_SIGNATURE = re.compile(r"sha256=([0-9a-f]{64})")
_NUMBER = re.compile(r"[0-9]{5,20}")


class WhatsAppSource(SourceFields):
    """Messages of WhatsApp."""

    kind: Literal["whatsapp"]
    #: The secret of the app, which signs.
    app_secret: SecretName
    #: The text that was entered where the address of the web hooks was.
    verify_token: SecretName
    #: Only messages to this number of the business; by default to all.
    phone_number_id: str | None = Field(default=None, pattern=r"^[0-9]{1,30}$")
    #: A message that is one of these words ends replies to its sender, or allows them again.
    stop: tuple[str, ...] = Field(
        default=("stop", "unsubscribe", "baja", "arrêt", "stopp", "parar", "sair"), max_length=50
    )
    start: tuple[str, ...] = Field(default=("start", "alta", "unstop"), max_length=50)

    def receive(self, request: ReceivedRequest, reveal: RevealSecret, now: datetime) -> list[InboundMessage]:
        """Return the messages and statuses of a request. Raises NotGenuine, InvalidInput."""
        del now
        match = _SIGNATURE.fullmatch(request.headers.get("x-hub-signature-256", ""))
        digest = hmac.new(reveal(self.app_secret).encode(), request.body, hashlib.sha256).hexdigest()
        if match is None or not hmac.compare_digest(match[1], digest):
            raise NotGenuine("the header X-Hub-Signature-256 is not the signature of the body by the secret of the app")
        body = json_message(request)
        if body.get("object") != _OBJECT:
            raise InvalidInput(
                [Problem("object", f"{str(body.get('object'))[:60]!r} is no event of WhatsApp", _OBJECT)], "message"
            )
        found = list(self._found(body))
        if len(found) > MAX_PER_REQUEST:
            problem = Problem("entry", f"it has {len(found)} messages", f"at most {MAX_PER_REQUEST}")
            raise InvalidInput([problem], "message")
        return found

    def challenge(self, question: AddressQuestion, reveal: RevealSecret) -> str:
        """Repeat the challenge for who has the token. Raises NotGenuine."""
        given, wanted = question.token.encode(), reveal(self.verify_token).encode()
        if question.mode != "subscribe" or not hmac.compare_digest(given, wanted):
            raise NotGenuine("hub.mode is not 'subscribe', or hub.verify_token is not the token")
        return question.challenge

    def _found(self, body: Mapping[str, Any]) -> Iterator[InboundMessage]:
        for change in (one for entry in _maps(body.get("entry")) for one in _maps(entry.get("changes"))):
            value = change.get("value")
            if change.get("field") != "messages" or not isinstance(value, Mapping):
                continue
            number = _text(_part(value, "metadata").get("phone_number_id"))
            if self.phone_number_id not in (None, number):
                continue
            names = {
                _text(contact.get("wa_id")): _text(_part(contact, "profile").get("name"))
                for contact in _maps(value.get("contacts"))
            }
            for message in _maps(value.get("messages")):
                if (made := self._message(message, names, number)) is not None:
                    yield made
            for status in _maps(value.get("statuses")):
                if (told := _status(status)) is not None:
                    yield told

    def _message(self, message: Mapping[str, Any], names: Mapping[str, str], number: str) -> InboundMessage | None:
        id_, sender, kind = _text(message.get("id")), _text(message.get("from")), _text(message.get("type"))
        if not _is_key(id_) or not _NUMBER.fullmatch(sender):
            return None
        content = _content(kind, message)
        found = {
            "id": id_,
            "from": f"+{sender}",
            "to": number,
            "name": names.get(sender, ""),
            "at": _instant(message.get("timestamp")),
            "type": kind,
            "reply_to": _text(_part(message, "context").get("id")),
            **(content or {}),
        }
        word = _text(found.get("text")).strip().strip(".!").casefold()
        consent: Literal["", "out", "in"] = "out" if word in self.stop else "in" if word in self.start else ""
        skipped = "" if content is not None else f"a message of the type {kind[:40]!r}, which has no content"
        if consent:
            skipped = "the sender wants no more replies" if consent == "out" else "the sender allows replies again"
        return InboundMessage(id_, found["from"][:MAX_SENDER], found, skipped, consent=consent)


def _content(kind: str, message: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a message says; None for types without content, such as reactions and those that Meta cannot show."""
    part = _part(message, kind)
    if kind == "text":
        return {"text": _text(part.get("body"))}
    if kind in _MEDIA:
        media = {name: _text(part.get(name)) for name in ("id", "mime_type", "sha256", "filename") if part.get(name)}
        return {"text": _text(part.get("caption")), "media": media}
    if kind == "interactive":
        reply = _part(part, _text(part.get("type")))
        return {"text": _text(reply.get("title")), "choice": _text(reply.get("id"))}
    if kind == "button":
        return {"text": _text(part.get("text")), "choice": _text(part.get("payload"))}
    if kind == "location":
        place = {name: part[name] for name in ("latitude", "longitude") if isinstance(part.get(name), int | float)}
        return {
            "text": " ".join(filter(None, (_text(part.get("name")), _text(part.get("address"))))),
            "location": place,
        }
    if kind == "contacts":
        contacts = [
            {
                "name": _text(_part(one, "name").get("formatted_name")),
                "phones": [_text(phone.get("phone")) for phone in _maps(one.get("phones"))][:_MAX_PARTS],
                "emails": [_text(email.get("email")) for email in _maps(one.get("emails"))][:_MAX_PARTS],
            }
            for one in _maps(message.get("contacts"))
        ]
        return {"text": ", ".join(str(one["name"]) for one in contacts), "contacts": contacts[:_MAX_PARTS]}
    return None


def _status(status: Mapping[str, Any]) -> InboundMessage | None:
    id_, state = _text(status.get("id")), _text(status.get("status"))
    recipient = texts.storable(_text(status.get("recipient_id")))
    if not id_ or not state or not _is_key(f"{id_}:{state}"):
        return None
    errors = [
        {"code": one.get("code") if isinstance(one.get("code"), int) else None, "title": _text(one.get("title"))}
        for one in _maps(status.get("errors"))
    ]
    found = {
        "id": id_,
        "type": "status",
        "status": state,
        "to": recipient,
        "at": _instant(status.get("timestamp")),
        "errors": errors[:_MAX_PARTS],
    }
    return InboundMessage(f"{id_}:{state}", f"+{recipient}"[:MAX_SENDER], found, f"the status {state!r} of a reply")


def _is_key(text: str) -> bool:
    return 0 < len(text) <= MAX_KEY and "\x00" not in text


def _maps(found: Any) -> list[Mapping[str, Any]]:
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _part(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = of.get(name)
    return found if isinstance(found, Mapping) else {}


def _text(found: Any) -> str:
    return found[:_MAX_TEXT] if isinstance(found, str) else ""


def _instant(found: Any) -> str:
    """Return a time in seconds since 1970, which Meta sends as a text, in ISO 8601."""
    text = _text(found)
    if not re.fullmatch(r"[0-9]{1,11}", text):
        return ""
    return datetime.fromtimestamp(int(text), UTC).isoformat() if int(text) < 1 << 35 else ""
