"""The target `http`: a JSON request to any server, and a second one that reads back what it has stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from app.handoffs.connectors.connector import DeliveryPlan, ExpressionText, HandoffPart, TargetFields

_TemplateText = Annotated[str, Field(min_length=1, max_length=4_000)]
#: The whole payload as JSON.
PAYLOAD = "{{ inputs.payload | tojson }}"


class ReadBack(HandoffPart):
    """How the target is asked what it has."""

    #: A template over `inputs.payload` and `steps.deliver.output`.
    url: _TemplateText
    headers: Mapping[str, _TemplateText] = {}
    #: An object to compare with the payload, field by field: an expression over `steps.read.output.body`.
    value: ExpressionText = "steps.read.output.body"

    def step(self, retry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the step that asks, after the step `deliver`."""
        return {
            "id": "read",
            "kind": "http",
            "needs": ["deliver"],
            "url": self.url,
            "headers": dict(self.headers),
            "retry": dict(retry),
        }


class HttpTarget(TargetFields):
    """A request to a server that `http.allowed_hosts` lists."""

    kind: Literal["http"]
    #: Templates over `inputs.payload`, `inputs.key` and `secrets`.
    url: _TemplateText
    method: Literal["POST", "PUT", "PATCH"] = "POST"
    headers: Mapping[str, _TemplateText] = {}
    #: The status codes that count as a success; by default 200 to 299.
    expect: tuple[int, ...] = ()
    read_back: ReadBack | None = None

    def plan(self, retry: Mapping[str, Any], fields: tuple[str, ...]) -> DeliveryPlan:
        """Return one step, and another one that reads back."""
        del fields
        deliver = {
            "id": "deliver",
            "kind": "http",
            "url": self.url,
            "method": self.method,
            "body": PAYLOAD,
            "headers": {"content-type": "application/json", **self.headers},
            **({"expect": list(self.expect)} if self.expect else {}),
            "retry": dict(retry),
        }
        plan = DeliveryPlan([deliver], {"response": "steps.deliver.output.body"})
        if self.read_back is not None:
            plan.steps.append(self.read_back.step(retry))
            plan.outputs["read"] = self.read_back.value
        return plan
