"""
A configuration: everything that decides how much memory a model takes when it is loaded.

Two pools of equal configurations take the same memory on equal devices; what changes no bytes is not in it.

A value; nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from app.catalog.engine_options import KvType, Tuning
from app.catalog.model import FLASH_ATTENTION, Model

#: Values of a block of each type of a KV cache, and bytes of that block: ggml's own table.
KV_BLOCKS: Mapping[KvType, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22),
    "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadConfiguration:
    """How a model is loaded, as far as memory goes. Which values go together, the catalogue checks."""

    #: Cells of the KV cache in all.
    context: int
    #: Sequences that the context holds: slots, and those that are kept for later requests.
    sequences: int
    #: Each sequence has a buffer of its own.
    streams: bool = False
    batch: int = 512
    ubatch: int = 512
    kv_type_k: KvType = "f16"
    kv_type_v: KvType = "f16"
    #: None leaves it to llama.cpp.
    flash_attention: bool | None = None
    #: Layers with a sliding window keep the whole context.
    swa_full: bool = True
    #: Layers on GPUs; -1 is all.
    gpu_layers: int = 0
    split_mode: Literal["none", "layer", "row", "tensor"] = "layer"
    #: Shares of the GPUs; empty for what llama.cpp makes of the memory that is free.
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    #: The file is mapped rather than read.
    mmap: bool = True
    #: Tokens of the second context, which gives vectors; 0 for none.
    embedding: int = 0
    #: How that context pools; None takes what the file says.
    pooling: Literal["mean", "cls", "last", "rank"] | None = None
    #: Bytes of host memory for the states of parked requests, at the most.
    parked: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "tensor_split": list(self.tensor_split)}

    @classmethod
    def of_json(cls, given: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        return cls(**{**given, "tensor_split": tuple(given["tensor_split"])})

    @property
    def flash(self) -> bool:
        """Whether attention is computed without its matrix, as far as can be told before: llama.cpp prefers it."""
        return self.flash_attention is not False


def of_tuning(
    tuning: Tuning,
    *,
    slots: int,
    cells: int,
    kv_k: KvType,
    kv_v: KvType,
    flash_attention: bool | None,
    embeds: bool,
    gpus: int,
) -> LoadConfiguration:
    """The configuration of an engine with these options on so many GPUs; `embeds` says that it gives vectors."""
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
        embedding=tuning.embedding_context if embeds else 0,
        pooling=tuning.pooling,
        parked=tuning.park_bytes,
    )


def of_model(model: Model, *, gpus: int) -> LoadConfiguration:
    """How a pool on so many GPUs loads the model of that entry."""
    return of_tuning(
        model.engine,
        slots=model.slots,
        cells=model.cells,
        kv_k=model.kv.k,
        kv_v=model.kv.v,
        flash_attention=FLASH_ATTENTION[model.flash_attention],
        embeds=model.serves_embeddings,
        gpus=gpus,
    )
