"""
A configuration: everything that decides how much memory a model takes when it is loaded.

Two pools of equal configurations take the same memory on equal devices; what changes no bytes is not in it.

A value; nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from app.fleet.model import Model
from app.kernel.errors import InvalidInput, Problem

#: Values of a block of each type of a KV cache, and bytes of that block: ggml's own table.
KV_BLOCKS: Mapping[str, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22),
    "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
}  # fmt: skip
#: Types that hold each value in full.
PLAIN = frozenset({"f32", "f16", "bf16"})
#: llama.cpp's LLAMA_MAX_SEQ.
_MOST_SEQUENCES = 256
#: Bytes of host memory for the states of parked requests, unless the pool says otherwise.
_PARKED = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Configuration:
    """How a model is loaded, as far as memory goes."""

    #: Requests computed together.
    slots: int
    #: Cells of the KV cache in all.
    context: int
    #: Sequences that the context holds: slots, and those that are kept for later requests.
    sequences: int
    #: Each sequence has a buffer of its own.
    streams: bool = False
    batch: int = 512
    ubatch: int = 512
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    #: None leaves it to llama.cpp.
    flash_attention: bool | None = None
    #: Layers with a sliding window keep the whole context.
    swa_full: bool = True
    #: Layers on GPUs; -1 is all.
    gpu_layers: int = 0
    split_mode: Literal["none", "layer", "row", "tensor"] = "layer"
    #: Shares of the devices; empty for equal ones.
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    #: The file is mapped rather than read.
    mmap: bool = True
    #: Tokens of the second context, which gives embeddings; 0 for none.
    embedding: int = 0
    #: How that context pools; None takes what the model says.
    pooling: Literal["mean", "cls", "last", "rank"] | None = None
    #: Bytes of host memory for the states of parked requests.
    parked: int = _PARKED

    def __post_init__(self) -> None:
        """Refuse what llama.cpp would refuse, or abort on. Raises InvalidInput with every problem."""
        problems = list(_problems(self))
        if problems:
            raise InvalidInput(problems, "configuration")

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


def of_model(model: Model, *, gpu_layers: int, devices: int = 1) -> Configuration:
    """How a pool loads the model of that entry."""
    configuration = Configuration(
        slots=model.slots,
        context=model.slots * model.context,
        sequences=min(_MOST_SEQUENCES, 2 * model.slots),
        kv_type_k=model.kv.k,
        kv_type_v=model.kv.v,
        flash_attention={"auto": None, "on": True, "off": False}[model.flash_attention],
        gpu_layers=gpu_layers,
        embedding=2048 if model.embeds else 0,
    )
    return replace(configuration, tensor_split=(1.0,) * devices if devices > 1 else ())


def _problems(given: Configuration) -> Iterator[Problem]:
    if not 1 <= given.slots <= 128:
        yield Problem("slots", f"{given.slots} slots", "1 to 128")
    if not given.slots <= given.sequences <= _MOST_SEQUENCES:
        yield Problem("sequences", f"{given.sequences} sequences", f"{given.slots} (slots) to {_MOST_SEQUENCES}")
    if not 256 <= given.context < 2**31 or (given.streams and given.context // max(given.slots, 1) < 32):
        yield Problem("context", f"{given.context} tokens for {given.slots} slots", "256 and more in all, 32 a slot")
    if not max(given.slots, 32) <= given.batch <= 2**20:
        yield Problem("batch", f"{given.batch} tokens", f"{max(given.slots, 32)} to {2**20}")
    if not 1 <= given.ubatch <= 2**20:
        yield Problem("ubatch", f"{given.ubatch} tokens", f"1 to {2**20}")
    for name, kind in (("kv_type_k", given.kv_type_k), ("kv_type_v", given.kv_type_v)):
        if kind not in KV_BLOCKS:
            yield Problem(name, f"there is no type {kind!r}", ", ".join(KV_BLOCKS))
    if given.kv_type_v not in PLAIN and given.flash_attention is False:
        yield Problem("kv_type_v", f"{given.kv_type_v} needs flash attention", ", ".join(sorted(PLAIN)))
    if given.gpu_layers < -1:
        yield Problem("gpu_layers", f"{given.gpu_layers} layers", "-1 for all, or 0 and more")
    if any(share < 0 for share in given.tensor_split) or (given.tensor_split and not any(given.tensor_split)):
        yield Problem("tensor_split", f"shares {given.tensor_split}", "numbers of 0 and more, not all 0")
