"""
The load configuration: all options that determine how much memory a loaded model uses.

Two pools with equal configurations use the same memory on equal devices. Options that do not affect memory are left
out.

Nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from app.catalog.engine_options import KvType, Tuning
from app.catalog.model import FLASH_ATTENTION, Model

#: Values and bytes of a block for each type of KV cache, from ggml's own table.
KV_BLOCKS: Mapping[KvType, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22),
    "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadConfiguration:
    """The options of a load that affect memory. The catalogue checks that they are compatible."""

    #: Cells of the KV cache, all sequences together.
    context: int
    #: Sequences of the context: the slots, and those that are kept for later requests.
    sequences: int
    #: Each sequence has its own buffer.
    streams: bool = False
    batch: int = 512
    ubatch: int = 512
    kv_type_k: KvType = "f16"
    kv_type_v: KvType = "f16"
    #: None lets llama.cpp choose.
    flash_attention: bool | None = None
    #: Layers with a sliding window keep the whole context.
    swa_full: bool = True
    #: Layers on GPUs; -1 means all.
    gpu_layers: int = 0
    split_mode: Literal["none", "layer", "row", "tensor"] = "layer"
    #: Proportions of the GPUs; empty means that llama.cpp splits in proportion to the free memory.
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    #: The file is memory-mapped.
    mmap: bool = True
    #: Tokens of the second context, for embeddings; 0 means none.
    embedding: int = 0
    #: Pooling type of that context; None means that of the file.
    pooling: Literal["mean", "cls", "last", "rank"] | None = None
    #: Maximum bytes of host memory for the states of parked requests and of prefixes that left the cache.
    parked: int = 0
    #: Most cells of an image, for projectors that follow its size; 0 means as many as the projector's file says.
    image_tokens: int = 0
    #: The most draft tokens in a decode. Each produces logits, as the last token of each sequence does.
    drafts: int = 0
    #: Slots of the context of the draft model; 0 means that there is none.
    draft_slots: int = 0

    def as_json(self) -> dict[str, Any]:
        """Returns the configuration as plain data."""
        found = {**asdict(self), "tensor_split": list(self.tensor_split)}
        if not self.image_tokens:  # so that measurements of models without images stay valid
            del found["image_tokens"]
        if not self.drafts:
            del found["drafts"]
        if not self.draft_slots:
            del found["draft_slots"]
        return found

    @classmethod
    def of_json(cls, given: Mapping[str, Any]) -> Self:
        """Returns the configuration that `as_json` represents."""
        return cls(**{**given, "tensor_split": tuple(given["tensor_split"])})

    @property
    def flash(self) -> bool:
        """Whether flash attention is expected: llama.cpp prefers it when it may choose."""
        return self.flash_attention is not False


def draft_context(configuration: LoadConfiguration) -> LoadConfiguration:
    """Returns the configuration of the draft model: as many slots, cells and devices, each slot with its own buffer."""
    return replace(
        configuration, sequences=configuration.draft_slots, streams=True, swa_full=True, embedding=0, pooling=None,
        parked=0, image_tokens=0, drafts=0, draft_slots=0,
    )  # fmt: skip


def of_tuning(
    tuning: Tuning,
    *,
    slots: int,
    cells: int,
    kv_k: KvType,
    kv_v: KvType,
    flash_attention: bool | None,
    embeddings: bool,
    gpus: int,
    image_tokens: int = 0,
    has_draft_model: bool = False,
) -> LoadConfiguration:
    """Returns the configuration of an engine; `embeddings` says whether it has an embedding context."""
    return LoadConfiguration(
        context=cells,
        sequences=tuning.sequence_count(slots, cells),
        streams=tuning.uses_streams(slots, cells),
        batch=tuning.batch,
        ubatch=min(tuning.batch, tuning.ubatch),
        kv_type_k=kv_k,
        kv_type_v=kv_v,
        flash_attention=False if tuning.reproducible else flash_attention,
        swa_full=tuning.swa_full,
        gpu_layers=tuning.gpu_layers if gpus else 0,
        split_mode=tuning.split_mode,
        tensor_split=tuning.tensor_split if gpus else (),
        main_gpu=tuning.main_gpu if gpus else 0,
        mmap=tuning.mmap,
        embedding=tuning.embedding_context if embeddings else 0,
        pooling=tuning.pooling,
        parked=tuning.state_bytes,
        image_tokens=image_tokens,
        drafts=tuning.drafts,
        draft_slots=slots if has_draft_model else 0,
    )


def of_model(model: Model, *, gpus: int) -> LoadConfiguration:
    """Returns the configuration in which a pool on this number of GPUs loads the model."""
    return of_tuning(
        model.engine,
        slots=model.slots,
        cells=model.cells,
        kv_k=model.kv.k,
        kv_v=model.kv.v,
        flash_attention=FLASH_ATTENTION[model.flash_attention],
        embeddings=model.serves_embeddings,
        gpus=gpus,
        image_tokens=(model.mmproj.image_tokens or 0) if model.mmproj is not None else 0,
        has_draft_model=model.engine.draft is not None,
    )
