"""
A model of the catalogue: its name, where its file comes from, and the numbers with which it is served.

Every value is checked when the entry is made, and no unknown key is kept.

Nothing here opens a file or a connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StringConstraints, model_validator

from app.catalog.engine_options import EngineEntry, KvType, SlotCount, require_harmony
from app.catalog.pool_options import Pooling, Simulated
from app.catalog.source import CatalogTable, ModelSource

#: How the catalogue's words for flash attention read for an engine: None leaves it to llama.cpp.
FLASH_ATTENTION: Mapping[str, bool | None] = {"auto": None, "on": True, "off": False}
_NAME = r"^[a-z0-9][a-z0-9._-]*:[a-z0-9][a-z0-9._-]*$"
_NAME_ACCEPTED = "family:size in lower case, such as 'qwen3:0.6b' (letters, digits, '.', '_', '-'; 64 at the most)"


def slug(name: str) -> str:
    """
    The name as queues, workers and metrics carry it: `smollm2:135m` is `smollm2-135m`.

    Only letters, digits and single hyphens are left, so that a dot or a colon can separate it from other words.
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class KvTypes(CatalogTable):
    """The types of the two halves of the cache. Smaller types need less memory and cost some precision."""

    k: KvType = Field(default="f16", description="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl")
    v: KvType = Field(default="f16", description="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl")


class PromptProfile(CatalogTable):
    """How requests become text for this model, where it differs from what its file says."""

    #: Jinja text in place of the template in the file, or the name of a shipped one.
    chat_template: str | None = Field(
        default=None, min_length=1, description="a Jinja text, or chatml, gemma, llama3 or plain"
    )
    #: `template` hands system messages to the template; `user` puts them before the first user message,
    #: for templates that know no system role.
    system: Literal["template", "user"] = Field(default="template", description="template or user")
    #: Goes before a conversation that has no system message.
    default_system: str | None = Field(default=None, min_length=1, description="a text")
    #: How the model writes calls of tools; None finds it in the template.
    tools: Literal["hermes", "llama3"] | None = Field(default=None, description="hermes or llama3")
    #: Values that the template can read, such as `enable_thinking`.
    arguments: Mapping[str, StrictBool | StrictInt | StrictFloat | str] = Field(
        default_factory=dict, description="a table of texts, numbers and booleans"
    )
    #: Added to the stop texts of each request.
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), description="a list of texts")
    #: Put before a text that is embedded in order to search.
    query_prefix: str = Field(default="", description="a text")
    #: Put before a text that is embedded in order to be found.
    document_prefix: str = Field(default="", description="a text")


_UseCase = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$", max_length=32)]


class Model(CatalogTable):
    """One entry of the catalogue."""

    name: Annotated[str, StringConstraints(pattern=_NAME, max_length=64)] = Field(description=_NAME_ACCEPTED)
    source: ModelSource = Field(description="a table with exactly one of the keys path, package, url, hf")
    description: str = Field(default="", description="a text")
    #: As the publisher writes it: an SPDX id where there is one.
    licence: str = Field(default="", description="a text, such as 'Apache-2.0'")
    use_cases: tuple[_UseCase, ...] = Field(
        min_length=1,
        description="a list of words in lower case, such as chat, extract, classify, summarise, embed, rerank",
    )
    #: Tokens that one slot can hold, prompt and answer together.
    context: StrictInt = Field(default=4096, ge=32, le=16_777_216, description="tokens of one slot, 32 to 16777216")
    #: Requests that one pool works on at the same time.
    slots: SlotCount = 4
    kv: KvTypes = Field(default=KvTypes(), description="a table such as { k = 'q8_0', v = 'q8_0' }")
    flash_attention: Literal["auto", "on", "off"] = Field(default="auto", description="auto, on or off")
    prompt: PromptProfile = Field(default=PromptProfile(), description="a table")
    engine: EngineEntry = Field(default=EngineEntry(), description="a table")
    pools: Pooling = Field(default=Pooling(), description="a table")
    simulated: Simulated = Field(default=Simulated(), description="a table")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        require_harmony(
            self.engine,
            slots=self.slots,
            kv_v=self.kv.v,
            flash_attention=FLASH_ATTENTION[self.flash_attention],
            adapters=self.engine.loras,
        )
        return self

    @property
    def cells(self) -> int:
        """Tokens that a pool holds, all slots together."""
        return self.slots * self.context

    @property
    def slug(self) -> str:
        """The name as queues and workers carry it."""
        return slug(self.name)

    @property
    def embeds(self) -> bool:
        """Whether vectors or scores may be asked of the model."""
        return not {"embed", "rerank"}.isdisjoint(self.use_cases)
