"""
The hand-off document: where messages come from, what is valid, how they are mapped, and where they go.

The types here validate the shape; `app.handoffs.check` checks what the parts say.
A definition names secrets and holds none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any

from pydantic import Field, StrictBool, StringConstraints, model_validator

from app.handoffs.connectors.connector import ExpressionText, HandoffPart
from app.handoffs.connectors.crm_targets import HubSpotTarget, TwentyTarget
from app.handoffs.connectors.email import EmailSource
from app.handoffs.connectors.http_target import HttpTarget
from app.handoffs.connectors.openapi_target import OpenApiTarget
from app.handoffs.connectors.routes_target import RoutesTarget
from app.handoffs.connectors.submission import SubmissionSource
from app.handoffs.connectors.webhook import WebhookSource
from app.handoffs.connectors.whatsapp import WhatsAppSource
from app.handoffs.connectors.whatsapp_target import WhatsAppTarget
from app.handoffs.connectors.workflow_target import WorkflowTarget
from app.kernel.units.durations import Duration
from app.workflows.language.step_work import Retry

#: The pattern of names, which are part of URLs.
NAME = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"

AnySource = Annotated[WebhookSource | WhatsAppSource | SubmissionSource | EmailSource, Field(discriminator="kind")]
AnyTarget = Annotated[
    HttpTarget | OpenApiTarget | HubSpotTarget | TwentyTarget | WhatsAppTarget | WorkflowTarget | RoutesTarget,
    Field(discriminator="kind"),
]

_FieldName = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class PayloadMapping(HandoffPart):
    """How a message becomes a payload: one expression over `message`, whose value is an object."""

    cel: ExpressionText | None = None
    jmespath: ExpressionText | None = None
    #: The JSON Schema of the payload. Formats (`email`, `e164`, `date`) are checked.
    schema_: Mapping[str, Any] = Field(default={}, alias="schema")

    @model_validator(mode="after")
    def _has_one_expression(self) -> PayloadMapping:
        if (self.cel is None) == (self.jmespath is None):
            raise ValueError("exactly one of 'cel' and 'jmespath' is needed")
        return self


class SuccessCriteria(HandoffPart):
    """When the hand-off counts as healthy."""

    #: The least part of messages that are delivered.
    target: float = Field(default=0.9, ge=0, le=1)
    #: A message that is delivered later than this after it came is late.
    deadline: Duration = Field(default=timedelta(minutes=5), ge=timedelta(milliseconds=100))


class MappingTest(HandoffPart):
    """An example: a message, and its payload or that it is invalid."""

    name: str = Field(min_length=1, max_length=200)
    message: Mapping[str, Any]
    payload: Mapping[str, Any] | None = None
    #: The message, or its payload, does not conform to its schema.
    invalid: StrictBool = False

    @model_validator(mode="after")
    def _has_one_result(self) -> MappingTest:
        if (self.payload is None) != self.invalid:
            raise ValueError("a test needs either 'payload' or 'invalid: true'")
        return self


class DeliveryRate(HandoffPart):
    """How many messages are sent at most in a time. Others wait."""

    requests: int = Field(ge=1, le=100_000)
    per: Duration = Field(ge=timedelta(seconds=1), le=timedelta(days=1))


class NextHandoff(HandoffPart):
    """Where a delivered message goes on: another hand-off of the namespace, with a source of the kind `api`."""

    handoff: str = Field(pattern=NAME, max_length=100)
    #: Its message: an object, over `message`, `payload`, `key` and `output` (of the run that has delivered).
    cel: ExpressionText
    #: A condition over the same; without it, always.
    when: ExpressionText | None = None


class Handoff(HandoffPart):
    """A hand-off document."""

    handoff: str = Field(pattern=NAME, max_length=100, description="its name: lower-case words joined by hyphens")
    description: str = Field(default="", max_length=2_000)
    source: AnySource
    #: The JSON Schema of a message.
    schema_: Mapping[str, Any] = Field(default={}, alias="schema")
    mapping: PayloadMapping
    target: AnyTarget
    #: How a delivery is tried again; as the `retry` of a step.
    retry: Retry = Retry(max_attempts=8, delay="2s", cap="5m")
    #: Fields of the payload that a complete message has.
    expected: tuple[_FieldName, ...] = Field(default=(), max_length=100)
    success: SuccessCriteria = SuccessCriteria()
    #: What the target can take.
    rate: DeliveryRate | None = None
    #: What follows a delivery.
    then: tuple[NextHandoff, ...] = Field(default=(), max_length=10)
    #: What is checked by `arriero handoffs check`, and whenever the document is stored.
    tests: tuple[MappingTest, ...] = Field(default=(), max_length=100)

    def document(self) -> dict[str, Any]:
        """Return the hand-off as plain data, as it is stored and shown: without the fields that were not set."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)

    def sha256(self) -> str:
        """Return the hash of the document, by which a version is known again."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the payload that the document names."""
        return tuple(dict.fromkeys([*self.expected, *self.mapping.schema_.get("properties", {})]))
