"""
Options: how one model is loaded and served. A value; the catalogue and the settings make it.

What it has in common with the catalogue is described and checked in `app.catalog.engine_options`.
Sizes are tokens unless the field says bytes. None leaves the choice to the engine or to llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from app.catalog.engine_options import Adapter, KvLayout, KvType, Rope, SlotCount, Tuning, require_harmony
from app.catalog.model import PromptProfile

#: The types of KV cells that llama.cpp computes attention on, by ggml's numbers.
KV_TYPES: Mapping[KvType, int] = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip

#: Bytes of one number of a KV cell.
KV_BYTES: Mapping[KvType, float] = {
    "f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}  # fmt: skip


class Lora(Adapter):
    """A LoRA adapter for the model, and where its file lies."""

    path: Path


class EngineOptions(Tuning):
    """One model, one context."""

    #: Requests computed together.
    slots: SlotCount = 8
    #: Cells of the KV cache in all; with streams each slot has its part. llama.cpp rounds up, to 256 for a buffer.
    context: int = Field(default=8192, ge=1)
    kv_type_k: KvType = "f16"
    kv_type_v: KvType = "f16"
    flash_attention: bool | None = None
    #: Whether vectors and scores may be asked for: the context that gives them takes memory of its own.
    vectors: bool = True
    loras: tuple[Lora, ...] = ()
    profile: PromptProfile = PromptProfile()

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        """Refuse what would make llama.cpp end the process or give no context."""
        require_harmony(
            self,
            slots=self.slots,
            kv_v=self.kv_type_v,
            flash_attention=self.flash_attention,
            adapters=self.loras,
        )
        return self

    @property
    def streams(self) -> bool:
        """Whether each slot has a buffer of its own."""
        return self.parts(self.slots, self.context)

    @property
    def shares(self) -> bool:
        """Whether prefixes are shared and kept."""
        return self.reuse and not self.reproducible

    @property
    def sequences(self) -> int:
        """Sequences that the context holds."""
        return self.holds(self.slots, self.context)


__all__ = ["KV_BYTES", "KV_TYPES", "EngineOptions", "KvLayout", "Lora", "Rope"]
