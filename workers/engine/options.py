"""
Engine options: how one model is loaded and served. Built from the catalogue and the settings.

The fields shared with the catalogue are defined and checked in `app.catalog.engine_options`.
Sizes are tokens unless the field says bytes. None leaves the choice to the engine or to llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator

from app.catalog.engine_options import (
    Adapter,
    DraftOptions,
    KvLayout,
    KvType,
    Rope,
    SlotCount,
    Tuning,
    require_compatible,
)
from app.catalog.model import PromptProfile

#: ggml's type numbers of the KV types for which llama.cpp computes attention.
KV_TYPES: Mapping[KvType, int] = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip

#: Bytes per number in a KV cell.
KV_BYTES: Mapping[KvType, float] = {
    "f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}  # fmt: skip


class Lora(Adapter):
    """A LoRA adapter for the model, with the path of its file."""

    path: Path


class DraftFile(DraftOptions):
    """The draft model, with the path of its file."""

    path: Path


class EngineOptions(Tuning):
    """The options of one engine: one model with one context."""

    #: Requests processed together.
    slots: SlotCount = 8
    #: The most CPU threads that may be chosen where `threads` is None; None means the cores of the process.
    most_threads: int | None = Field(default=None, ge=1)
    #: Cells of the whole KV cache; with streams each slot has an equal part. llama.cpp rounds each buffer up to 256.
    context: int = Field(default=8192, ge=1)
    kv_type_k: KvType = "f16"
    kv_type_v: KvType = "f16"
    flash_attention: bool | None = None
    #: Whether embeddings and scores can be requested. Their context needs additional memory.
    vectors: bool = True
    loras: tuple[Lora, ...] = ()
    #: A smaller model that predicts tokens; None means that they are only looked up.
    draft: DraftFile | None = None
    #: The file that encodes images for the model (mmproj); None means that it reads text only.
    projector: Path | None = None
    #: Most cells of an image, for projectors that follow its size; None means as many as the projector's file says.
    image_tokens: int | None = None
    profile: PromptProfile = PromptProfile()
    #: Where the states of prefixes are stored in files; None means in no file, whatever `store_disk_bytes` says.
    store_folder: Path | None = None
    #: The key of encrypted states; None means one that ends with the engine.
    store_key: SecretStr | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        """Reject combinations with which llama.cpp aborts the process or creates no context."""
        require_compatible(
            self,
            slots=self.slots,
            kv_v=self.kv_type_v,
            flash_attention=self.flash_attention,
            adapters=self.loras,
            draft=self.draft,
        )
        return self

    @property
    def streams(self) -> bool:
        """Whether each slot has its own buffer of the KV cache."""
        return self.uses_streams(self.slots, self.context)

    @property
    def shares(self) -> bool:
        """Whether prefixes are shared and kept."""
        return self.reuse and not self.reproducible

    @property
    def sequences(self) -> int:
        """Number of sequences of the context."""
        return self.sequence_count(self.slots, self.context)

    @property
    def outputs(self) -> int:
        """The most tokens of a decode that produce logits. llama.cpp aborts when it is less than the sequences."""
        return self.sequences + self.drafts


__all__ = ["KV_BYTES", "KV_TYPES", "DraftFile", "EngineOptions", "KvLayout", "Lora", "Rope"]
