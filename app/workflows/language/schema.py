"""
The JSON Schema of a workflow, for editors and other programs.

It is generated from the types of the definition. The descriptions are the docstrings of the types and the `#:` comments
of their fields.

A schema cannot express every rule (that needs exist, that a step has either a prompt or messages);
`app.workflows.language.check` checks these.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import CoreSchema, DictSchema, ModelSchema

from app.kernel.sections.section import comments_of
from app.workflows.language.definition import Definition

#: The name of the schema; it is served at `/v1/schemas/workflow`.
ID = "urn:arriero:schema:workflow"


@lru_cache(maxsize=1)
def workflow() -> Mapping[str, Any]:
    """Return the JSON Schema of a workflow, draft 2020-12."""
    made = Definition.model_json_schema(schema_generator=_Generator)
    return {"$schema": _Generator.schema_dialect, "$id": ID, **made, "title": "A workflow of Arriero"}


class _Generator(GenerateJsonSchema):
    """A schema generator that uses `#:` comments as descriptions, and leaves out redundant titles and defaults."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        cls = schema["cls"]
        made["description"] = _description(cls)
        comments = comments_of(cls)
        for name, field in cls.model_fields.items():
            written = made["properties"][field.alias or name]
            described = [comments.get(name, ""), written.get("description", "")]
            if any(described):
                written["description"] = ". ".join(part[0].upper() + part[1:] for part in described if part)
            if "$ref" in written:
                # The defaults of a nested part are those of its own fields.
                written.pop("default", None)
        return made

    def dict_schema(self, schema: DictSchema) -> JsonSchemaValue:
        made = super().dict_schema(schema)
        # Keys that do not match the pattern are rejected.
        return {**made, "additionalProperties": False} if "patternProperties" in made else made

    def field_title_should_be_set(self, schema: CoreSchema) -> bool:  # noqa: ARG002 a name given by pydantic
        return False


def _description(cls: type[BaseModel]) -> str:
    """Return the docstring of a type; for a step, that of the class that declares its `kind`."""
    kind = next((base for base in cls.__mro__ if "kind" in vars(base).get("__annotations__", {})), cls)
    return inspect.getdoc(kind) or ""
