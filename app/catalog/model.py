"""
A model of the catalogue: its name, the source of its file, and its serving options.

Every value is validated when the entry is created. Unknown keys are rejected.

Nothing here opens a file or a connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StringConstraints, field_validator, model_validator

from app.catalog.engine_options import EngineEntry, KvType, SlotCount, require_compatible
from app.catalog.pool_options import PoolOptions, SimulatedOptions
from app.catalog.profiles.families import FAMILIES
from app.catalog.profiles.family import RecommendedSampling, ToolCallStyle
from app.catalog.serving.remote_options import RemoteEntry
from app.catalog.serving.selection_options import ALIAS_ACCEPTED, SELECTOR_PREFIX, Alias, FallbackOptions, Rating
from app.catalog.source import CatalogTable, ModelSource, ServerSource

#: Maps the catalogue's values of `flash_attention` to those of an engine; None lets llama.cpp choose.
FLASH_ATTENTION: Mapping[str, bool | None] = {"auto": None, "on": True, "off": False}
#: Names of templates that are shipped, for models whose file has none.
SHIPPED_TEMPLATES = ("chatml", "gemma", "llama3", "plain")
_NAME = r"^[a-z0-9][a-z0-9._-]*:[a-z0-9][a-z0-9._-]*$"
_NAME_ACCEPTED = "family:size in lower case, such as 'qwen3:0.6b' (letters, digits, '.', '_', '-'; at most 64)"


def slug(name: str) -> str:
    """
    Returns the form of a model name that queues, workers and metrics use: `smollm2-135m` for `smollm2:135m`.

    It consists of letters, digits and single hyphens, so that a dot or a colon can separate it from other words.
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class KvTypes(CatalogTable):
    """The types of the K cache and the V cache. Smaller types need less memory and lose some precision."""

    k: KvType = Field(default="f16", description="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl")
    v: KvType = Field(default="f16", description="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl")


class PromptProfile(CatalogTable):
    """How requests are formatted as text for this model, where this differs from the model file."""

    #: Jinja text that replaces the template of the file, or the name of a shipped template.
    chat_template: str | None = Field(
        default=None, min_length=1, description="a Jinja text, or chatml, gemma, llama3 or plain"
    )
    #: `template` passes system messages to the template; `user` puts them before the first user message, for templates
    #: without a system role.
    system: Literal["template", "user"] = Field(default="template", description="template or user")
    #: System message of conversations that have none.
    default_system: str | None = Field(default=None, min_length=1, description="a text")
    #: The format in which the model writes tool calls; None detects it from the template.
    tools: ToolCallStyle | None = Field(default=None, description=f"one of {', '.join(get_args(ToolCallStyle))}")
    #: The family of the model (docs/profiles.md); None detects it from the file.
    profile: str | None = Field(default=None, description=f"none, or one of {', '.join(FAMILIES)}")
    #: Replaces what the family, or the file, recommends for requests without these parameters.
    sampling: RecommendedSampling = Field(default=RecommendedSampling(), description="a table of numbers")
    #: Variables for the template, such as `enable_thinking`.
    arguments: Mapping[str, StrictBool | StrictInt | StrictFloat | str] = Field(
        default_factory=dict, description="a table of texts, numbers and booleans"
    )
    #: Added to the stop texts of each request.
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), description="a list of texts")
    #: Prefix of a text that is embedded as a query.
    query_prefix: str = Field(default="", description="a text")
    #: Prefix of a text that is embedded as a document.
    document_prefix: str = Field(default="", description="a text")

    @field_validator("profile")
    @classmethod
    def _is_known(cls, given: str | None) -> str | None:
        if given is not None and given != "none" and given not in FAMILIES:
            raise ValueError(f"{given[:40]!r} is no profile; accepted are none, {', '.join(FAMILIES)}")
        return given


class ProjectorEntry(CatalogTable):
    """The file that encodes images for a model (mmproj)."""

    source: ModelSource = Field(description="a table with exactly one of the keys path, package, convert, url, hf")
    #: Most cells of an image, for models that follow its size; None means as many as the file says.
    image_tokens: StrictInt | None = Field(default=None, ge=4, le=65_536, description="a whole number from 4 to 65536")


_UseCase = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$", max_length=32)]


class Model(CatalogTable):
    """One entry of the catalogue."""

    name: Annotated[str, StringConstraints(pattern=_NAME, max_length=64)] = Field(description=_NAME_ACCEPTED)
    source: ModelSource = Field(description="a table with exactly one of the keys path, package, convert, url, hf")
    description: str = Field(default="", description="a text")
    #: The licence as the publisher writes it: an SPDX id where there is one.
    licence: str = Field(default="", description="a text, such as 'Apache-2.0'")
    use_cases: tuple[_UseCase, ...] = Field(
        min_length=1,
        description="a list of words in lower case, such as chat, extract, classify, summarise, embed, rerank",
    )
    #: Tokens of one slot: prompt and answer together.
    context: StrictInt = Field(default=4096, ge=32, le=16_777_216, description="tokens of one slot, 32 to 16777216")
    #: Requests that one pool processes at the same time.
    slots: SlotCount = 4
    kv: KvTypes = Field(default=KvTypes(), description="a table such as { k = 'q8_0', v = 'q8_0' }")
    flash_attention: Literal["auto", "on", "off"] = Field(default="auto", description="auto, on or off")
    prompt: PromptProfile = Field(default=PromptProfile(), description="a table")
    engine: EngineEntry = Field(default=EngineEntry(), description="a table")
    #: What lets it read images.
    mmproj: ProjectorEntry | None = Field(default=None, description="a table with source and image_tokens")
    pools: PoolOptions = Field(default=PoolOptions(), description="a table")
    simulated: SimulatedOptions = Field(default=SimulatedOptions(), description="a table")
    #: The server of a model that has no file.
    remote: RemoteEntry | None = Field(default=None, description="a table with url and model, instead of a source")
    #: Other names, unique in the catalogue.
    aliases: tuple[Alias, ...] = Field(default=(), max_length=32, description=f"a list of names: {ALIAS_ACCEPTED}")
    rating: Rating = Field(default=Rating(), description="a table such as { quality = 0.8, speed = 0.3 }")
    fallback: FallbackOptions = Field(
        default=FallbackOptions(), description="a list of names of models, or a table with models, on and max_wait"
    )

    @model_validator(mode="before")
    @classmethod
    def _has_one_origin(cls, given: Any) -> Any:
        """A model comes from a file or from a server; the source of the latter follows from its table."""
        if not isinstance(given, dict) or given.get("remote") is None:
            return given
        remote, source = given["remote"], given.get("source")
        url = remote.url if isinstance(remote, RemoteEntry) else remote.get("url") if isinstance(remote, dict) else ""
        if (
            source is not None
            and not isinstance(source, ServerSource)
            and set(source) - {"size", "sha256"} != {"server"}
        ):
            raise ValueError("a model has either a file (source) or a server (remote), and this one has both")
        return {**given, "source": {"server": str(url or "").rstrip("/")}}

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        if isinstance(self.source, ServerSource) and self.remote is None:
            raise ValueError("a model without a file has a table `remote`")
        for alias in self.aliases:
            if alias.lower().startswith(SELECTOR_PREFIX) or alias in ("select", self.name):
                raise ValueError(f"the alias {alias!r} is reserved, or the model's own name: {ALIAS_ACCEPTED}")
        if self.remote is not None and self.mmproj is not None:
            raise ValueError("a model of a server has no projector (mmproj) here")
        if self.remote is not None and self.pools.min > 1:
            raise ValueError("a model of a server has at most one pool: pools.min is 0 or 1")
        return self

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        require_compatible(
            self.engine,
            slots=self.slots,
            kv_v=self.kv.v,
            flash_attention=FLASH_ATTENTION[self.flash_attention],
            adapters=self.engine.loras,
            draft=self.engine.draft,
        )
        return self

    @property
    def cells(self) -> int:
        """Tokens of all slots of a pool together: the cells of its KV cache."""
        return self.slots * self.context

    @property
    def slug(self) -> str:
        """The form of the name that queues and workers use."""
        return slug(self.name)

    @property
    def serves_embeddings(self) -> bool:
        """Whether the model serves embeddings or rerank scores."""
        return not {"embed", "rerank"}.isdisjoint(self.use_cases)
