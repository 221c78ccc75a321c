"""
The engine's options for one model: how it is loaded and served, beyond its context, slots, cache and prompts.

They are the table `[models.engine]` of a catalogue, and what an engine is given: the same fields, checked once, here.
Sizes are tokens unless a field says bytes. What is left out is the engine's choice, or llama.cpp's.

Nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StringConstraints

from app.catalog.source import CatalogTable, ModelSource

#: What llama.cpp takes as the type of a cache (`--cache-type-k`, `--cache-type-v`).
KvType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]

#: Types that hold each value in full; llama.cpp keeps any other V cache only with flash attention.
PLAIN_KV = frozenset({"f32", "f16", "bf16"})

#: Requests that one engine works on at the same time; llama.cpp holds 256 sequences, kept ones too.
SlotCount = Annotated[StrictInt, Field(ge=1, le=128, description="a whole number from 1 to 128")]

#: Slots from which on streams are taken, if each then holds at least so many tokens.
STREAMS_FROM, STREAMS_HOLD = 16, 1024

#: Sequences of a context at the most: llama.cpp's LLAMA_MAX_SEQ.
_SEQUENCES = 256
#: GPUs that llama.cpp splits a model over, at the most.
_DEVICES = 16

_Tokens = Annotated[StrictInt, Field(ge=1, description="a whole number of tokens, at least 1")]
_Switch = Annotated[StrictBool, Field(description="true or false")]


class KvLayout(StrEnum):
    """How sequences lie in the KV cache."""

    #: One buffer: prefixes are shared without copying, and a request may take any share of it.
    UNIFIED = "unified"
    #: A buffer for each slot: faster attention for independent requests; prefixes are copied.
    STREAMS = "streams"


def layout_for(slots: int, cells: int, kept: int | None) -> KvLayout:
    """
    The layout that decodes faster, where nothing else asks for the other (figures in docs/engine.md).

    In one buffer attention walks the cells of all texts for each: a step of 16 slots takes 5 to 32 % longer there, of
    32 slots 19 to 84 %. With fewer slots the two are near each other, and one buffer serves requests of any length.
    Sequences that are to be kept beside the slots need it.
    """
    parted = slots >= STREAMS_FROM and cells // slots >= STREAMS_HOLD and not kept
    return KvLayout.STREAMS if parted else KvLayout.UNIFIED


class Rope(CatalogTable):
    """RoPE scaling, for texts longer than the model was trained on. None and 0 take what the file says."""

    scaling: Literal["none", "linear", "yarn", "longrope"] | None = Field(
        default=None, description="none, linear, yarn or longrope"
    )
    freq_base: StrictFloat = Field(default=0.0, ge=0, description="a number, 0 for that of the file")
    freq_scale: StrictFloat = Field(default=0.0, ge=0, description="a number, 0 for that of the file")
    yarn_original_context: StrictInt = Field(default=0, ge=0, description="tokens, 0 for those of the file")


class Adapter(CatalogTable):
    """A LoRA adapter."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)] = Field(
        description="letters in lower case, digits, '.', '_', '-'; 64 at the most"
    )
    #: Its weight from the start; 0 loads it for later use.
    scale: StrictFloat = Field(default=1.0, ge=-100, le=100, description="a number from -100 to 100")


class SourcedAdapter(Adapter):
    """An adapter in a catalogue."""

    source: ModelSource = Field(description="a table with exactly one of the keys path, package, url, hf")


class Tuning(CatalogTable):
    """What a catalogue and an engine's own options have in common."""

    #: None takes the one that `layout_for` gives.
    layout: KvLayout | None = Field(default=None, description="unified or streams")
    #: Finished sequences that stay for later requests (unified only: with streams a free slot keeps its own).
    #: None keeps as many as there are slots.
    kept: StrictInt | None = Field(default=None, ge=0, le=255, description="a whole number from 0 to 255")
    #: Whether prompts are shared and kept at all.
    reuse: _Switch = True
    #: Prompt tokens computed in one step at the most.
    batch: StrictInt = Field(default=512, ge=32, le=65_536, description="a whole number from 32 to 65536")
    #: Tokens that llama.cpp computes at a time; memory for the computation grows with it.
    ubatch: StrictInt = Field(default=512, ge=1, le=65_536, description="a whole number from 1 to 65536")
    #: Seconds that prompts may add to a step while somebody reads along, or an interactive text is written.
    step_latency: StrictFloat = Field(default=0.2, gt=0, le=60, description="seconds, more than 0, up to 60")
    #: Each decode holds one request, so its text does not depend on who else is served. Sets streams, no reuse and
    #: no flash attention.
    reproducible: _Switch = False
    #: None takes what the pool was given (setting pools.threads); an engine alone takes the cores of its process.
    threads: StrictInt | None = Field(default=None, ge=1, le=1024, description="a whole number from 1 to 1024")
    #: For prompts and embeddings; None takes `threads`.
    threads_batch: StrictInt | None = Field(default=None, ge=1, le=1024, description="a whole number from 1 to 1024")
    #: Sliding-window layers keep the whole context: prefixes can be cut anywhere, for more memory.
    swa_full: _Switch = True
    mmap: _Switch = True
    #: Keep the weights from being swapped out.
    mlock: _Switch = False
    #: Layers on GPUs; -1 is all.
    gpu_layers: StrictInt = Field(default=-1, ge=-1, description="a whole number, -1 for all")
    split_mode: Literal["none", "layer", "row", "tensor"] = Field(
        default="layer", description="none, layer, row or tensor"
    )
    #: The share of each GPU.
    tensor_split: tuple[Annotated[StrictFloat, Field(ge=0)], ...] = Field(
        default=(), max_length=_DEVICES, description=f"a list of up to {_DEVICES} numbers, at least 0"
    )
    main_gpu: StrictInt = Field(default=0, ge=0, lt=_DEVICES, description=f"a whole number from 0 to {_DEVICES - 1}")
    rope: Rope = Field(default=Rope(), description="a table")
    #: Bytes of host memory for the states of parked requests.
    park_bytes: StrictInt = Field(default=512 * 2**20, ge=0, description="a whole number of bytes")
    #: A request that was parked is parked again only after so many more tokens.
    park_progress: _Tokens = 32
    #: Seconds of waiting after which a request counts as one class better; 0 never does.
    patience: StrictFloat = Field(default=30.0, ge=0, description="seconds, at least 0")
    #: Requests that may wait; one more is refused.
    queue: StrictInt = Field(default=10_000, ge=1, description="a whole number, at least 1")
    #: Tokens of the context for embeddings; a text longer than this is cut into windows.
    embedding_context: StrictInt = Field(default=2048, ge=16, le=131_072, description="tokens, 16 to 131072")
    #: None takes what the file says, or the mean.
    pooling: Literal["mean", "cls", "last", "rank"] | None = Field(default=None, description="mean, cls, last or rank")

    def parts(self, slots: int, cells: int) -> bool:
        """Whether each of so many slots gets a buffer of its own, of so many cells in all."""
        layout = self.layout or layout_for(slots, cells, self.kept)
        return self.reproducible or layout is KvLayout.STREAMS

    def holds(self, slots: int, cells: int) -> int:
        """Sequences of the context: one for each slot, and those that are kept for later requests."""
        if self.parts(slots, cells):
            return slots
        return min(_SEQUENCES, slots + (slots if self.kept is None else self.kept) * self.reuse)


class EngineEntry(Tuning):
    """The table `[models.engine]`."""

    loras: tuple[SourcedAdapter, ...] = Field(default=(), description="a list of tables with name, scale and source")


class Conflicts(ValueError):
    """Values that are right by themselves and do not go together."""

    def __init__(self, found: Iterable[tuple[str, str, str]]) -> None:
        #: For each: the key, what is wrong, what would be accepted.
        self.found = tuple(found)
        super().__init__(
            "; ".join(f"{where}: {message}; accepted: {accepted}" for where, message, accepted in self.found)
        )


def require_harmony(
    engine: Tuning, *, slots: int, kv_v: KvType, flash_attention: bool | None, adapters: Iterable[Adapter]
) -> None:
    """Raises Conflicts unless all of it goes together."""
    names = [adapter.name for adapter in adapters]
    found = list(_conflicts(engine, slots, kv_v, flash_attention, names))
    if found:
        raise Conflicts(found)


def _conflicts(
    engine: Tuning, slots: int, kv_v: KvType, flash_attention: bool | None, adapters: list[str]
) -> Iterator[tuple[str, str, str]]:
    if engine.batch < slots:
        yield "engine.batch", f"{engine.batch} tokens are fewer than the {slots} slots", f"at least {slots}"
    if kv_v not in PLAIN_KV and (flash_attention is False or engine.reproducible):
        why = "reproducible is without it" if engine.reproducible else "flash_attention is off"
        yield "kv.v", f"llama.cpp keeps {kv_v} only with flash attention, and {why}", ", ".join(sorted(PLAIN_KV))
    if engine.reproducible and flash_attention:
        yield "flash_attention", "reproducible is without flash attention", "auto or off"
    if engine.tensor_split and (engine.split_mode == "none" or not sum(engine.tensor_split)):
        yield "engine.tensor_split", "there is nothing to split", "another split_mode, and a share above 0"
    if len(set(adapters)) < len(adapters):
        yield "engine.loras", "two adapters have the same name", "each name once"
