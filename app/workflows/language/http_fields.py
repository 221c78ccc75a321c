"""The fields of `http` steps, which tools of agents have too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from app.workflows.language.step_work import HEADER, PositiveDuration, StepWork, Template


class HttpFields(StepWork):
    """Sends an HTTP request. Its output is `status`, `headers` and `body`: the value of a JSON response, or a text."""

    kind: Literal["http"]
    url: Template
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] | None = None
    headers: Mapping[str, Template] = {}
    query: Mapping[str, Template] = {}
    #: A JSON body; each string in it is a template.
    json_: JsonValue = Field(default=None, alias="json")
    #: A text body.
    body: Template | None = None
    #: The status codes that count as a success. By default 200 to 299.
    expect: tuple[Annotated[int, Field(ge=100, le=599)], ...] = ()
    #: Maximum bytes of the response body, decompressed.
    max_bytes: int = Field(default=1_048_576, ge=1, le=64 * 1_048_576)
    follow_redirects: bool = False
    #: The header for the idempotency key, which is the same for all attempts of this step.
    idempotency_header: str = Field(default="Idempotency-Key", pattern=HEADER)
    timeout: PositiveDuration = Field(default="30s", validate_default=True)

    @model_validator(mode="after")
    def _has_one_body(self) -> HttpFields:
        if "json_" in self.model_fields_set and self.body is not None:
            raise ValueError("an http step can have either 'json' or 'body', not both")
        return self

    @property
    def has_json(self) -> bool:
        """Whether a JSON body is set; the body may be null."""
        return "json_" in self.model_fields_set

    def templates(self) -> Iterator[tuple[str, str]]:
        yield "url", self.url
        yield from ((f"headers.{name}", value) for name, value in self.headers.items())
        yield from ((f"query.{name}", value) for name, value in self.query.items())
        yield from _strings(self.json_, "json")
        if self.body is not None:
            yield "body", self.body


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _strings(inner, f"{where}[{i}]")
