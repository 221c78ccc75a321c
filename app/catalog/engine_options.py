"""
Engine options of one model: how it is loaded and served, in addition to its context, slots, cache and prompts.

The table `[models.engine]` of a catalogue and the options of an engine share these fields; they are validated here.
Sizes are tokens unless a field says bytes. For an option that is not set, the engine or llama.cpp chooses.

Nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StringConstraints

from app.catalog.source import CatalogTable, ModelSource

#: Types that llama.cpp accepts for a cache (`--cache-type-k`, `--cache-type-v`).
KvType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]

#: Cache types without quantisation; llama.cpp supports any other type of V cache only with flash attention.
UNQUANTISED_KV = frozenset({"f32", "f16", "bf16"})

#: Requests that one engine processes at the same time; llama.cpp holds 256 sequences, kept ones included.
SlotCount = Annotated[StrictInt, Field(ge=1, le=128, description="a whole number from 1 to 128")]

#: Streams are the default from this number of slots on, if each slot then holds at least this many tokens.
MIN_STREAM_SLOTS, MIN_STREAM_TOKENS = 8, 1024

#: Draft tokens in a decode, of all texts together. Each needs logits: 8 bytes for each token of the vocabulary.
MAX_DRAFTS = 16

#: Maximum sequences of a context: llama.cpp's LLAMA_MAX_SEQ.
_MAX_SEQUENCES = 256
#: Maximum GPUs over which llama.cpp splits a model.
_MAX_GPUS = 16

_Tokens = Annotated[StrictInt, Field(ge=1, description="a whole number of tokens, at least 1")]
_Switch = Annotated[StrictBool, Field(description="true or false")]


class KvLayout(StrEnum):
    """How sequences are stored in the KV cache."""

    #: One buffer: prefixes are shared without copying, and a request may use any part of it.
    UNIFIED = "unified"
    #: One buffer for each slot: faster attention for independent requests; prefixes are copied.
    STREAMS = "streams"


def default_layout(slots: int, cells: int, kept: int | None) -> KvLayout:
    """
    Returns the layout that decodes faster when no option requires the other (figures in docs/engine.md).

    In a unified buffer, attention reads the cells of all sequences for each sequence. With 8 slots of dialogues the
    engine wrote a third fewer tokens a second than with streams. With fewer slots the difference is small, and one
    buffer serves requests of any length. Keeping sequences in addition to the slots requires a unified buffer.
    """
    streams = slots >= MIN_STREAM_SLOTS and cells // slots >= MIN_STREAM_TOKENS and not kept
    return KvLayout.STREAMS if streams else KvLayout.UNIFIED


class Rope(CatalogTable):
    """RoPE scaling, for texts longer than those of the training. None and 0 mean the value of the file."""

    scaling: Literal["none", "linear", "yarn", "longrope"] | None = Field(
        default=None, description="none, linear, yarn or longrope"
    )
    freq_base: StrictFloat = Field(default=0.0, ge=0, description="a number, 0 for that of the file")
    freq_scale: StrictFloat = Field(default=0.0, ge=0, description="a number, 0 for that of the file")
    yarn_original_context: StrictInt = Field(default=0, ge=0, description="tokens, 0 for those of the file")


class Adapter(CatalogTable):
    """A LoRA adapter."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)] = Field(
        description="lower-case letters, digits, '.', '_', '-'; at most 64"
    )
    #: Its initial weight; 0 loads it for later use.
    scale: StrictFloat = Field(default=1.0, ge=-100, le=100, description="a number from -100 to 100")


class SourcedAdapter(Adapter):
    """A LoRA adapter of a catalogue entry, with the source of its file."""

    source: ModelSource = Field(description="a table with exactly one of the keys path, package, convert, url, hf")


class DraftOptions(CatalogTable):
    """The use of a draft model: a smaller model with the same vocabulary, which predicts tokens."""

    #: The most tokens that it predicts for a text in one step.
    most: StrictInt = Field(default=8, ge=1, le=MAX_DRAFTS, description=f"a whole number from 1 to {MAX_DRAFTS}")


class SourcedDraft(DraftOptions):
    """The draft model of a catalogue entry, with the source of its file."""

    source: ModelSource = Field(description="a table with exactly one of the keys path, package, convert, url, hf")


class Tuning(CatalogTable):
    """The options that a catalogue entry and an engine have in common."""

    #: None means the result of `default_layout`.
    layout: KvLayout | None = Field(default=None, description="unified or streams")
    #: Finished sequences that are kept for later requests (unified only: with streams each free slot keeps its own).
    #: None means as many as there are slots.
    kept: StrictInt | None = Field(default=None, ge=0, le=255, description="a whole number from 0 to 255")
    #: Whether prompt prefixes are shared and kept (prefix caching).
    reuse: _Switch = True
    #: Maximum prompt tokens that are computed in one step.
    batch: StrictInt = Field(default=512, ge=32, le=65_536, description="a whole number from 32 to 65536")
    #: Tokens of a micro-batch of llama.cpp; the compute buffers grow with it.
    ubatch: StrictInt = Field(default=512, ge=1, le=65_536, description="a whole number from 1 to 65536")
    #: Seconds that prompts may add to a step while a response is streamed or an interactive request is served.
    #: None means a share that follows from the speed of the machine.
    step_latency: StrictFloat | None = Field(default=None, gt=0, le=60, description="seconds, more than 0, up to 60")
    #: Each decode holds one request, so its text does not depend on other requests. Implies streams, no reuse and no
    #: flash attention.
    reproducible: _Switch = False
    #: Whether tokens that a text probably continues with are computed in advance and verified, when that is faster.
    speculation: Literal["auto", "off"] = Field(default="auto", description="auto or off")
    #: None means that the number follows from measurements, up to the pool's share of the setting pools.threads.
    threads: StrictInt | None = Field(default=None, ge=1, le=1024, description="a whole number from 1 to 1024")
    #: Threads for prompts and embeddings; None means `threads`.
    threads_batch: StrictInt | None = Field(default=None, ge=1, le=1024, description="a whole number from 1 to 1024")
    #: Sliding-window layers keep the whole context: prefixes can be cut anywhere, at the cost of memory.
    swa_full: _Switch = True
    mmap: _Switch = True
    #: Locks the weights in RAM, so that they are never swapped out.
    mlock: _Switch = False
    #: Layers on GPUs; -1 means all.
    gpu_layers: StrictInt = Field(default=-1, ge=-1, description="a whole number, -1 for all")
    split_mode: Literal["none", "layer", "row", "tensor"] = Field(
        default="layer", description="none, layer, row or tensor"
    )
    #: The proportion of the model on each GPU.
    tensor_split: tuple[Annotated[StrictFloat, Field(ge=0)], ...] = Field(
        default=(), max_length=_MAX_GPUS, description=f"a list of up to {_MAX_GPUS} numbers, at least 0"
    )
    main_gpu: StrictInt = Field(default=0, ge=0, lt=_MAX_GPUS, description=f"a whole number from 0 to {_MAX_GPUS - 1}")
    rope: Rope = Field(default=Rope(), description="a table")
    #: Bytes of host memory for the states of parked requests.
    park_bytes: StrictInt = Field(default=512 * 2**20, ge=0, description="a whole number of bytes")
    #: Bytes of host memory for the states of prefixes that left the cache; 0 keeps none.
    store_bytes: StrictInt = Field(default=256 * 2**20, ge=0, description="a whole number of bytes")
    #: Bytes of files for these states, in the data directory; 0 writes none.
    store_disk_bytes: StrictInt = Field(default=0, ge=0, description="a whole number of bytes")
    #: The files are encrypted: with the key of the setting pools.store_key, or one that ends with the pool.
    store_encrypted: _Switch = False
    #: Tokens that a resumed request computes before it can be parked again.
    park_progress: _Tokens = 32
    #: Seconds of waiting after which a request is treated as one priority class higher; 0 turns this off.
    patience: StrictFloat = Field(default=30.0, ge=0, description="seconds, at least 0")
    #: Maximum requests that wait; further ones are refused.
    queue: StrictInt = Field(default=10_000, ge=1, description="a whole number, at least 1")
    #: Tokens of the embedding context; a longer text is split into windows.
    embedding_context: StrictInt = Field(default=2048, ge=16, le=131_072, description="tokens, 16 to 131072")
    #: None means the pooling type of the file, or the mean.
    pooling: Literal["mean", "cls", "last", "rank"] | None = Field(default=None, description="mean, cls, last or rank")

    @property
    def state_bytes(self) -> int:
        """
        Returns the maximum bytes of host memory for states: of parked requests, and of prefixes that left the cache.

        Without files, prefixes use what parked requests leave. With files, they have memory of their own.
        """
        has_files = self.store_disk_bytes and self.reuse and not self.reproducible
        return self.park_bytes + (self.store_bytes if has_files else 0)

    @property
    def drafts(self) -> int:
        """The most draft tokens in a decode. With drafts the shape of a decode, and so its rounding, would vary."""
        return MAX_DRAFTS if self.speculation == "auto" and not self.reproducible else 0

    def uses_streams(self, slots: int, cells: int) -> bool:
        """Returns whether each slot has its own buffer; `cells` is the total of all slots."""
        layout = self.layout or default_layout(slots, cells, self.kept)
        return self.reproducible or layout is KvLayout.STREAMS

    def sequence_count(self, slots: int, cells: int) -> int:
        """Returns the number of sequences of the context: one for each slot, and those kept for later requests."""
        if self.uses_streams(slots, cells):
            return slots
        return min(_MAX_SEQUENCES, slots + (slots if self.kept is None else self.kept) * self.reuse)


class EngineEntry(Tuning):
    """The table `[models.engine]` of a catalogue entry."""

    loras: tuple[SourcedAdapter, ...] = Field(default=(), description="a list of tables with name, scale and source")
    draft: SourcedDraft | None = Field(default=None, description="a table with source and most")


class ConflictingOptions(ValueError):
    """Options whose values are valid one by one but conflict with each other."""

    def __init__(self, found: Iterable[tuple[str, str, str]]) -> None:
        #: For each conflict: the key, what is wrong, what would be accepted.
        self.found = tuple(found)
        super().__init__(
            "; ".join(f"{where}: {message}; accepted: {accepted}" for where, message, accepted in self.found)
        )


def require_compatible(
    engine: Tuning,
    *,
    slots: int,
    kv_v: KvType,
    flash_attention: bool | None,
    adapters: Iterable[Adapter],
    draft: DraftOptions | None,
) -> None:
    """Raises ConflictingOptions when the options conflict with each other."""
    names = [adapter.name for adapter in adapters]
    found = list(_conflicts_of(engine, slots, kv_v, flash_attention, names))
    if draft is not None and not engine.drafts:
        why = "reproducible is on" if engine.reproducible else "speculation is off"
        accepted = "reproducible = false" if engine.reproducible else "speculation = 'auto'"
        found.append(("engine.draft", f"the draft model would not be used, because {why}", accepted))
    if found:
        raise ConflictingOptions(found)


def _conflicts_of(
    engine: Tuning, slots: int, kv_v: KvType, flash_attention: bool | None, adapters: list[str]
) -> Iterator[tuple[str, str, str]]:
    if engine.batch < slots:
        yield "engine.batch", f"{engine.batch} tokens are fewer than the {slots} slots", f"at least {slots}"
    if kv_v not in UNQUANTISED_KV and (flash_attention is False or engine.reproducible):
        why = "reproducible turns it off" if engine.reproducible else "flash_attention is off"
        yield "kv.v", f"llama.cpp keeps {kv_v} only with flash attention, and {why}", ", ".join(sorted(UNQUANTISED_KV))
    if engine.reproducible and flash_attention:
        yield "flash_attention", "reproducible turns flash attention off", "auto or off"
    if engine.store_disk_bytes and not engine.store_bytes:
        yield "engine.store_disk_bytes", "states pass through host memory, and store_bytes is 0", "store_bytes above 0"
    if engine.store_disk_bytes and (engine.reproducible or not engine.reuse):
        why = "reproducible is on" if engine.reproducible else "reuse is off"
        yield "engine.store_disk_bytes", f"no prefix is reused, because {why}", "0"
    if engine.tensor_split and (engine.split_mode == "none" or not sum(engine.tensor_split)):
        yield "engine.tensor_split", "there is nothing to split", "another split_mode, and a share above 0"
    if len(set(adapters)) < len(adapters):
        yield "engine.loras", "two adapters have the same name", "each name once"
