"""
Options: how one model is loaded and served. A value; the catalogue and the settings make it.

Sizes are tokens unless the field says bytes. None leaves the choice to the engine or to llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from app.kernel.errors import InvalidSettings, Problem


class KvLayout(StrEnum):
    """How sequences lie in the KV cache."""

    #: One buffer: prefixes are shared without copying, and a request may take any share of it.
    UNIFIED = "unified"
    #: A buffer for each slot: faster attention for independent requests; prefixes are copied.
    STREAMS = "streams"


#: Slots from which on streams are taken, if each then holds at least so many tokens.
STREAMS_FROM, STREAMS_HOLD = 16, 1024


def layout_for(slots: int, context: int) -> KvLayout:
    """
    The layout that decodes faster, where it costs little else (figures in docs/engine.md).

    In one buffer attention walks the cells of all texts for each: a step of 16 slots takes 5 to 32 % longer there, of
    32 slots 19 to 84 %. With fewer slots the two are near each other, and one buffer serves requests of any length.
    """
    return KvLayout.STREAMS if slots >= STREAMS_FROM and context // slots >= STREAMS_HOLD else KvLayout.UNIFIED


#: The types of KV cells that llama.cpp computes attention on, by ggml's numbers.
KV_TYPES: Mapping[str, int] = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip

#: Bytes of one number of a KV cell.
KV_BYTES: Mapping[str, float] = {
    "f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter for the model."""

    name: str
    path: Path
    #: Used from the start with this weight; 0 loads it for later use.
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """RoPE scaling; None and 0 take what the model says."""

    scaling: Literal["none", "linear", "yarn", "longrope"] | None = None
    freq_base: float = 0.0
    freq_scale: float = 0.0
    yarn_original_context: int = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """What a model's family wants of a prompt: overrides of what its file says."""

    #: Jinja source, or the name of a shipped one: `chatml`, `gemma`, `llama3`, `plain`.
    chat_template: str | None = None
    #: Goes before the conversation when it has no system message.
    system: str | None = None
    #: System messages are put before the first user message, for templates that know no system role.
    system_as_user: bool = False
    #: Texts that end every answer.
    stop: tuple[str, ...] = ()
    #: How the model writes tool calls; None finds it in the template.
    tools: Literal["hermes", "llama3"] | None = None
    #: Passed to the template, such as `enable_thinking`.
    variables: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """One model, one context."""

    #: Requests computed together.
    slots: int = 8
    #: Cells of the KV cache in all; with streams each slot has its part.
    context: int = 8192
    #: None takes the one that `layout_for` gives.
    layout: KvLayout | None = None
    #: Finished sequences that are kept for later requests (unified layout only; a free slot keeps its own).
    kept: int | None = None
    #: Whether prompts are shared and kept at all.
    reuse: bool = True
    #: Prompt tokens computed in one step at the most.
    batch: int = 512
    #: Tokens that llama.cpp computes at a time; memory for the computation grows with it.
    ubatch: int = 512
    #: Seconds that prompts may add to a step while somebody reads along, or an interactive text is written.
    step_latency: float = 0.2
    #: Each decode holds one request, so its text does not depend on who else is served. Sets streams, no reuse and
    #: no flash attention.
    reproducible: bool = False
    #: None takes the cores that this process may use.
    threads: int | None = None
    threads_batch: int | None = None
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool | None = None
    #: Sliding-window layers keep the whole context: prefixes can be cut anywhere, for more memory.
    swa_full: bool = True
    mmap: bool = True
    mlock: bool = False
    #: Layers on GPUs; -1 is all.
    gpu_layers: int = -1
    split_mode: Literal["none", "layer", "row", "tensor"] = "layer"
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    rope: Rope = Rope()
    loras: tuple[Lora, ...] = ()
    profile: Profile = Profile()
    #: Bytes of host memory for the states of parked requests.
    park_bytes: int = 512 * 2**20
    #: A request that was parked is parked again only after so many more tokens.
    park_progress: int = 32
    #: Seconds of waiting after which a request counts as one class better.
    patience: float = 30.0
    #: Requests that may wait; one more is refused.
    queue: int = 10_000
    #: Tokens of the context for embeddings; a text longer than this is cut into windows.
    embedding_context: int = 2048
    #: None takes what the model says, or the mean.
    pooling: Literal["mean", "cls", "last", "rank"] | None = None

    def __post_init__(self) -> None:
        """Refuse what would make llama.cpp end the process or give no context."""
        problems = []
        if not 1 <= self.slots <= 128:
            problems.append(Problem("slots", f"{self.slots} slots", "1 to 128"))
        if self.batch < max(self.slots, 32):
            problems.append(Problem("batch", f"{self.batch} tokens", f"at least {max(self.slots, 32)}"))
        if self.ubatch < 1:
            problems.append(Problem("ubatch", f"{self.ubatch} tokens", "at least 1"))
        problems.extend(
            Problem(name, f"no KV type {kind!r}", ", ".join(KV_TYPES))
            for name, kind in (("kv_type_k", self.kv_type_k), ("kv_type_v", self.kv_type_v))
            if kind not in KV_TYPES
        )
        if self.kv_type_v not in ("f32", "f16", "bf16") and (self.flash_attention is False or self.reproducible):
            problems.append(Problem("kv_type_v", "a quantised V cache needs flash attention", "f16"))
        if self.context < 256 or (self.streams and self.context // self.slots < 32):
            problems.append(
                Problem("context", f"{self.context} tokens for {self.slots} slots", "at least 256, 32 a slot")
            )
        if problems:
            raise InvalidSettings(problems, "engine options")

    @property
    def streams(self) -> bool:
        """Whether each slot has a buffer of its own."""
        return self.reproducible or (self.layout or layout_for(self.slots, self.context)) is KvLayout.STREAMS

    @property
    def shares(self) -> bool:
        """Whether prefixes are shared and kept."""
        return self.reuse and not self.reproducible

    @property
    def sequences(self) -> int:
        """Sequences that the context holds."""
        if self.streams:
            return self.slots
        return min(256, self.slots + (self.slots if self.kept is None else self.kept) * self.shares)
