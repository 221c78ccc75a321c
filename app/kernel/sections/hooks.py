"""The tables `hooks` of the settings: what looks at requests to models and at their results."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from app.kernel.sections.section import Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class HookPoint(StrEnum):
    """Where a hook is called."""

    PRE_PROMPT = "pre_prompt"
    POST_RESULT = "post_result"


#: Hooks that are part of Arriero.
ShippedKind = Literal["pii", "secrets", "words", "language", "injection"]
SHIPPED_KINDS = frozenset({"pii", "secrets", "words", "language", "injection"})

_NAMES = Field(
    default=("*",), min_length=1, max_length=100, description="a list of names or of patterns such as 'qwen*'"
)
_LONGEST = timedelta(minutes=1)


class HookDefinition(Section):
    """A hook: a table `[[hooks]]` of arriero.toml."""

    #: Its unique name, for records, metrics and errors.
    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,62}$", description="lower-case letters, digits, '-'")
    #: `pii`, `secrets`, `words`, `language` or `injection` are shipped; `combine` asks the server of another model too;
    #: `python` calls an entry point, `http` a server.
    kind: ShippedKind | Literal["combine", "python", "http"] = Field(
        description="pii, secrets, words, language, injection, combine, python or http"
    )
    #: `pre_prompt`, `post_result` or `both`.
    at: Literal["pre_prompt", "post_result", "both"] = Field(
        default="both", description="pre_prompt, post_result or both"
    )
    #: The name of an entry point of the group `arriero.hooks`, for the kind `python`.
    entry_point: str | None = Field(
        default=None, pattern=r"^[A-Za-z_][\w.-]{0,99}$", description="the name of an entry point"
    )
    #: The address for the kind `http`; `http.allowed_hosts` must list its host.
    url: str | None = Field(default=None, max_length=2_000, description="https://… or http://…")
    #: The name of the secret that signs the calls of the kind `http`.
    secret: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]{0,62}$", description="the name of a secret")
    #: Only for these models, workflows and namespaces; `*` stands for any characters.
    models: tuple[str, ...] = _NAMES
    workflows: tuple[str, ...] = _NAMES
    namespaces: tuple[str, ...] = _NAMES
    #: Hooks with a smaller number see the prompt earlier, and the result later.
    order: int = Field(default=0, ge=-1_000, le=1_000, description="a number from -1000 to 1000")
    #: For one call.
    timeout: Annotated[Duration, durations.at_least("50ms")] = Field(
        default=timedelta(seconds=5), description="a duration such as '5s', from 50ms to 1m"
    )
    #: When the hook fails: `closed` refuses the request, `open` goes on without the hook.
    on_failure: Literal["open", "closed"] = Field(default="closed", description="open or closed")
    #: Whether a hook at `post_result` may change texts; streams are held back until it has.
    changes: bool = Field(default=True, description="true or false")
    #: What the hook is given; for shipped ones see docs/hooks.md.
    options: Mapping[str, Any] = Field(default_factory=dict, max_length=100, description="a table")

    @field_validator("timeout")
    @classmethod
    def _is_short(cls, value: timedelta) -> timedelta:
        if value > _LONGEST:
            raise ValueError("must be at most 1m")
        return value

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("must be an address such as https://hooks.example.com/check")
            if parts.username is not None or parts.password is not None:
                raise ValueError("must not contain a password: use `secret`, which signs the calls")
            if parts.query or parts.fragment:
                raise ValueError("must not have a query, which may be a secret: use `options`, or `secret`")
        return value

    @field_validator("models", "workflows", "namespaces")
    @classmethod
    def _are_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            if not one or len(one) > 200:
                raise ValueError("each name has 1 to 200 characters")
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        for field, kind in (("entry_point", "python"), ("url", "http")):
            if (getattr(self, field) is None) == (self.kind == kind):
                raise ValueError(f"`{field}` is needed for the kind '{kind}', and for no other")
        if self.kind == "combine" and (self.at != "post_result" or not self.changes):
            raise ValueError("the kind 'combine' has `at = \"post_result\"`, and `changes = true`")
        if self.secret is not None and self.kind != "http":
            raise ValueError("`secret` is for the kind 'http' only")
        return self

    @property
    def is_shipped(self) -> bool:
        """Whether it is part of Arriero."""
        return self.kind in SHIPPED_KINDS

    def is_at(self, point: HookPoint) -> bool:
        """Whether it is called at a point."""
        return self.at in ("both", point)
