"""
The JSON Schema of a workflow, for editors and other programs: made from the definition's own types, so that it knows
what they know. Descriptions are the docstrings of the types and the comments of their fields.

What a schema cannot say (that needs exist, that a step has either a prompt or messages) is seen by
`app.workflows.language.check`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import CoreSchema, DictSchema, ModelSchema

from app.workflows.language.definition import Definition

#: The name of the schema; it is served at `/v1/schemas/workflow`.
ID = "urn:arriero:schema:workflow"


@lru_cache(maxsize=1)
def workflow() -> Mapping[str, Any]:
    """The schema of a workflow, draft 2020-12."""
    made = Definition.model_json_schema(schema_generator=_Generator)
    return {"$schema": _Generator.schema_dialect, "$id": ID, **made, "title": "A workflow of Arriero"}


class _Generator(GenerateJsonSchema):
    """Takes the comments of fields as their descriptions, and leaves out what only repeats other parts."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        cls = schema["cls"]
        made["description"] = _description(cls)
        comments = _comments(cls)
        for name, field in cls.model_fields.items():
            written = made["properties"][field.alias or name]
            told = [comments.get(name, ""), written.get("description", "")]
            if any(told):
                written["description"] = ". ".join(part[0].upper() + part[1:] for part in told if part)
            if "$ref" in written:
                # What a part is without being written stands at its own fields.
                written.pop("default", None)
        return made

    def dict_schema(self, schema: DictSchema) -> JsonSchemaValue:
        made = super().dict_schema(schema)
        # Keys of another form are refused, not ignored.
        return {**made, "additionalProperties": False} if "patternProperties" in made else made

    def field_title_should_be_set(self, schema: CoreSchema) -> bool:  # noqa: ARG002 a name given by pydantic
        return False


def _description(cls: type[BaseModel]) -> str:
    """What a type says of itself; for a step, what the type says that names its kind."""
    kind = next((base for base in cls.__mro__ if "kind" in vars(base).get("__annotations__", {})), cls)
    return inspect.getdoc(kind) or ""


_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
_FIELD = re.compile(r"(?P<comment>(?:^    #:.*\n)+)^    (?P<name>\w+):", re.MULTILINE)


def _comments(cls: type[BaseModel]) -> dict[str, str]:
    """The `#:` comment above each field of a type and of those that it builds on."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _comments_of_module(base.__module__).get(base.__name__, {})
    return found


@lru_cache
def _comments_of_module(name: str) -> dict[str, dict[str, str]]:
    """The comments of the fields of each type of a module."""
    _, *parts = _CLASS.split(inspect.getsource(sys.modules[name]))
    found: dict[str, dict[str, str]] = {}
    for type_name, body in zip(parts[::2], parts[1::2], strict=True):
        for match in _FIELD.finditer(body):
            lines = (line.strip().removeprefix("#:").strip() for line in match["comment"].splitlines())
            found.setdefault(type_name, {})[match["name"]] = " ".join(lines).removesuffix(".")
    return found
