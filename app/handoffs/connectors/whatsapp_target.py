"""The target `whatsapp`: replies by Meta's WhatsApp Cloud API, as a text or from a template that Meta has approved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from app.handoffs.connectors.connector import DeliveryPlan, HandoffPart, SecretName, TargetFields

_FieldName = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class WhatsAppTemplate(HandoffPart):
    """A template of the business: outside of the 24 hours after a message of the recipient, Meta delivers no others."""

    name: str = Field(pattern=r"^[a-z0-9_]{1,512}$")
    language: str = Field(default="en", pattern=r"^[a-z]{2,3}(_[A-Z]{2})?$")
    #: The fields of the payload that fill {{1}}, {{2}} and so on.
    parameters: tuple[_FieldName, ...] = Field(default=(), max_length=20)


class WhatsAppTarget(TargetFields):
    """A reply. Who has sent a word of `stop` gets none."""

    kind: Literal["whatsapp"]
    #: The number of the business that sends.
    phone_number_id: str = Field(pattern=r"^[0-9]{1,30}$")
    token: SecretName
    #: The field of the payload with the number of the recipient.
    to: _FieldName = "to"
    #: The field of the payload with the text; or a template instead.
    text: _FieldName | None = None
    template: WhatsAppTemplate | None = None
    url: str = Field(default="https://graph.facebook.com/v23.0", pattern=r"^https?://[^\s{}]{1,300}$")

    @model_validator(mode="after")
    def _has_one_form(self) -> WhatsAppTarget:
        if (self.text is None) == (self.template is None):
            raise ValueError("exactly one of 'text' and 'template' is needed")
        return self

    def recipient(self, payload: Mapping[str, Any]) -> str:
        """Return the number of the recipient, in the form of senders."""
        return f"+{str(payload.get(self.to, '')).lstrip('+')}"

    def plan(self, retry: Mapping[str, Any], fields: tuple[str, ...]) -> DeliveryPlan:
        """Return one step."""
        del fields

        def value(name: str) -> str:
            return f"string(inputs.payload[{json.dumps(name)}])"

        content = f'"type": "text", "text": {{"preview_url": false, "body": {value(self.text)}}}' if self.text else ""
        if self.template is not None:
            filled = ", ".join(f'{{"type": "text", "text": {value(name)}}}' for name in self.template.parameters)
            parts = f', "components": [{{"type": "body", "parameters": [{filled}]}}]' if filled else ""
            content = (
                f'"type": "template", "template": {{"name": "{self.template.name}", '
                f'"language": {{"code": "{self.template.language}"}}{parts}}}'
            )
        body = f'{{"messaging_product": "whatsapp", "to": {value(self.to)}, {content}}}'
        shape = {"id": "shape", "kind": "transform", "cel": body}
        deliver = {
            "id": "deliver",
            "kind": "http",
            "needs": ["shape"],
            "url": f"{self.url}/{self.phone_number_id}/messages",
            "method": "POST",
            "headers": {"content-type": "application/json", "authorization": f"Bearer {{{{ secrets.{self.token} }}}}"},
            "body": "{{ steps.shape.output | tojson }}",
            "retry": dict(retry),
        }
        return DeliveryPlan([shape, deliver], {"response": "steps.deliver.output.body"})
