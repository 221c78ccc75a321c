"""
The targets `hubspot` and `twenty`: a record of a CRM, created or updated by its key, and read back.

The shapes are those of the public REST APIs: HubSpot's `/crm/v3/objects/…/batch/upsert`, Twenty's
`/rest/…?upsert=true`.
Another CRM that updates by a key in the URL is reached by the target `http`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from app.handoffs.connectors.connector import DeliveryPlan, SecretName, TargetFields

_FieldName = Annotated[str, StringConstraints(min_length=1, max_length=100)]
_Property = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,99}(\.[A-Za-z][A-Za-z0-9_]{0,99})?$")]
_Url = Annotated[str, StringConstraints(pattern=r"^https?://[^\s{}]{1,300}$")]
_ObjectName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,60}$")]


class _CrmTarget(TargetFields):
    """What both have: which field of the payload goes where."""

    token: SecretName
    #: Property of the record to field of the payload. A field that a payload lacks leaves the property as it is.
    fields: Mapping[_Property, _FieldName] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _properties_are_apart(self) -> Self:
        groups = {name.partition(".")[0] for name in self.fields if "." in name}
        if both := sorted(groups & self.fields.keys()):
            raise ValueError(f"'fields' has {both[0]!r} and properties of it")
        return self

    def _steps(self, retry: Mapping[str, Any], shape: str, url: str, read: str) -> list[dict[str, Any]]:
        headers = {"authorization": f"Bearer {{{{ secrets.{self.token} }}}}"}
        sent = {
            "url": url,
            "method": "POST",
            "headers": {"content-type": "application/json", **headers},
            "body": "{{ steps.shape.output | tojson }}",
        }
        return [
            {"id": "shape", "kind": "transform", "cel": shape},
            {"id": "deliver", "kind": "http", "needs": ["shape"], **sent, "retry": dict(retry)},
            {"id": "read", "kind": "http", "needs": ["deliver"], "url": read, "headers": headers, "retry": dict(retry)},
        ]


class HubSpotTarget(_CrmTarget):
    """An object of HubSpot."""

    kind: Literal["hubspot"]
    url: _Url = "https://api.hubapi.com"
    object: _ObjectName = "contacts"
    #: The property by which a record is known: one with unique values.
    id_property: _Property = "email"

    @model_validator(mode="after")
    def _has_its_key(self) -> HubSpotTarget:
        if self.id_property not in self.fields:
            raise ValueError(f"'fields' lacks the property {self.id_property!r} of 'id_property'")
        if any("." in name for name in self.fields):
            raise ValueError("'fields' has a property with a dot; those of HubSpot have none")
        return self

    def plan(self, retry: Mapping[str, Any], fields: tuple[str, ...]) -> DeliveryPlan:
        """Return the steps: shape, upsert, read back."""
        del fields
        key = f"string(inputs.payload[{json.dumps(self.fields[self.id_property])}])"
        body = (
            f'{{"inputs": [{{"idProperty": "{self.id_property}", "id": {key}, "properties": {_tree(self.fields)}}}]}}'
        )
        base = f"{self.url}/crm/v3/objects/{self.object}"
        read = (
            f"{base}/{{{{ steps.deliver.output.body.results[0].id | urlencode }}}}?properties={','.join(self.fields)}"
        )
        found = _found(self.fields, "steps.read.output.body.properties")
        steps = self._steps(retry, body, f"{base}/batch/upsert", read)
        return DeliveryPlan(steps, {"response": "steps.deliver.output.body", "read": found})


class TwentyTarget(_CrmTarget):
    """A record of Twenty. Properties of composite fields have a dot: `name.firstName`, `emails.primaryEmail`."""

    kind: Literal["twenty"]
    url: _Url
    object: _ObjectName = "people"
    #: The name of one, as in the answers.
    singular: _ObjectName = "person"

    def plan(self, retry: Mapping[str, Any], fields: tuple[str, ...]) -> DeliveryPlan:
        """Return the steps: shape, upsert, read back. Twenty knows a record by its unique fields."""
        del fields
        created = f"create{self.singular[0].upper()}{self.singular[1:]}"
        base = f"{self.url}/rest/{self.object}"
        read = f"{base}/{{{{ steps.deliver.output.body.data.{created}.id | urlencode }}}}"
        found = _found(self.fields, f"steps.read.output.body.data.{self.singular}")
        steps = self._steps(retry, _tree(self.fields), f"{base}?upsert=true", read)
        return DeliveryPlan(steps, {"response": "steps.deliver.output.body", "read": found})


def _tree(fields: Mapping[str, str]) -> str:
    """Return the CEL expression of a record: nested by the dots of properties, without what the payload lacks."""
    plain = [(name, field) for name, field in fields.items() if "." not in name]
    parts = [f'?"{name}": inputs.payload[?{json.dumps(field)}]' for name, field in plain]
    groups = dict.fromkeys(name.partition(".")[0] for name in fields if "." in name)
    for group in groups:
        inner = {name.partition(".")[2]: field for name, field in fields.items() if name.startswith(f"{group}.")}
        parts.append(f'"{group}": {_tree(inner)}')
    return "{" + ", ".join(parts) + "}"


def _found(fields: Mapping[str, str], record: str) -> str:
    """
    Return the CEL expression of what a record has, by the fields of the payload. Of a field that is in several
    properties the first one is read.
    """
    parts = []
    first_of: dict[str, str] = {}
    for name, field in fields.items():
        first_of.setdefault(field, name)
    for field, name in first_of.items():
        first, _, second = name.partition(".")
        there = f"has({record}.{first})" + (f" && has({record}.{name})" if second else "")
        parts.append(f"?{json.dumps(field)}: {there} ? optional.of({record}.{name}) : optional.none()")
    return "{" + ", ".join(parts) + "}"
