"""
The combination of a local and a remote answer: when the hook `combine` asks a server too, and which answer is used.

Nothing here opens a connection.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator, model_validator

from app.inference.requests import FinishReason, Generated, GenerateRequest
from app.json_schema import validation
from app.kernel.security import regex


class CombineOptions(BaseModel):
    """The options of the hook `combine`. Without a condition the server is always asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: A model of the catalogue that a server serves.
    model: Annotated[str, Field(min_length=1, max_length=100)]
    #: The local answer has fewer characters.
    shorter_than: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    #: This pattern (RE2) is in the local answer, such as a refusal.
    matches: Annotated[str, Field(min_length=1, max_length=1_000)] | None = None
    #: The local answer was cut at its limit of tokens.
    truncated: StrictBool = False
    #: The local answer does not have the form in JSON that was asked for.
    invalid_json: StrictBool = False
    #: `remote`: the server's answer. `longer`: the longer one. `valid`: the server's if it alone has the form in JSON.
    choose: Literal["remote", "longer", "valid"] = "remote"
    #: Most tokens of the server's answer; by default those of the request.
    max_tokens: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None

    @field_validator("matches")
    @classmethod
    def _is_a_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            regex.compiled(value)
        return value

    @model_validator(mode="after")
    def _can_be_used(self) -> CombineOptions:
        if self.choose == "valid" and (self.shorter_than is not None or self.matches is not None):
            raise ValueError("choose 'valid' is for requests in JSON: use it with invalid_json, truncated or alone")
        return self


def why_not(request: GenerateRequest) -> str | None:
    """Return why a request is left to the local model, or None."""
    if request.tools:
        return "it has tools"
    if request.n > 1 or request.logprobs is not None:
        return "it asks for several texts, or for log-probabilities"
    if request.images:
        return "it has images"
    if request.grammar is not None:
        return "it has a grammar"
    return None


def why(options: CombineOptions, request: GenerateRequest, local: Generated) -> str | None:
    """Return why the server is asked too, or None."""
    if options.truncated and local.finish is FinishReason.LENGTH:
        return "truncated"
    if options.invalid_json and not is_valid(request, local.text):
        return "invalid_json"
    if options.shorter_than is not None and len(local.text.strip()) < options.shorter_than:
        return "shorter_than"
    if options.matches is not None and regex.compiled(options.matches).found_in(local.text):
        return "matches"
    has_condition = options.truncated or options.invalid_json or options.shorter_than or options.matches
    return None if has_condition else "always"


def uses_remote(options: CombineOptions, request: GenerateRequest, local: Generated, remote: Generated) -> bool:
    """Whether the server's answer is used. One without a text never is, nor one that breaks the form in JSON."""
    if not remote.text.strip() or (request.schema is not None and not is_valid(request, remote.text)):
        return False
    match options.choose:
        case "longer":
            return len(remote.text) > len(local.text)
        case "valid":
            return not is_valid(request, local.text)
    return True


def is_valid(request: GenerateRequest, text: str) -> bool:
    """Whether a text has the form in JSON that its request asks for; also where it asks for none."""
    if request.schema is None:
        return True
    try:
        return validation.conforms(request.schema, json.loads(text))
    except (ValueError, RecursionError):
        return False
