"""
The anatomy of a model: what the header of its file says, as values.

`header` reads it. Nothing here opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the table of tensors."""

    name: str
    #: As `gguf` names it: `Q4_K`, `F32`.
    type: str
    #: Elements in each dimension, ggml's order: the first is the length of a row.
    shape: tuple[int, ...]
    #: Bytes of its data, without padding.
    size: int

    @property
    def elements(self) -> int:
        """Values that it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a model says. A number that the file does not give is None."""

    #: The file, or all parts of a split model in their order.
    parts: tuple[Path, ...]
    version: int
    #: The model's own name, or the name of its file.
    name: str
    architecture: str
    #: `model`, `adapter`, `mmproj`, `imatrix`; as `general.type` says, else by the architecture.
    kind: str
    #: As llama.cpp names it: `Q4_K_M`; without such a name, the type with the most bytes.
    quantisation: str
    #: As the publisher writes it: `135M`.
    size_label: str | None
    licence: str | None
    #: Tokens with which the model was trained.
    context_length: int | None
    layers: int | None
    embedding_length: int | None
    #: Attention heads of each layer; 0 in a layer without attention.
    heads: tuple[int, ...]
    #: Heads of the cache in each layer.
    kv_heads: tuple[int, ...]
    #: Values of one head's key and of its value.
    key_length: int | None
    value_length: int | None
    #: Tokens that the sliding layers look back; None without such layers.
    sliding_window: int | None
    experts: int | None
    experts_used: int | None
    #: Kind of the tokenizer: `gpt2`, `llama`, `bert`.
    tokenizer: str | None
    vocabulary: int | None
    chat_template: str | None
    parameters: int
    #: Bytes of all parts.
    file_bytes: int
    #: Bytes of all tensors, without padding.
    tensor_bytes: int
    #: The same for two models only if no header differs: then they take the same memory, whatever their weights are.
    digest: str
    tensors: tuple[Tensor, ...] = field(repr=False)
    #: Every key but the tokenizer's lists and other long arrays.
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def path(self) -> Path:
        """The file that llama.cpp is given: the first part."""
        return self.parts[0]

    @property
    def pools(self) -> bool:
        """Whether the file says how embeddings are pooled: a model made for embedding."""
        return bool(self.metadata.get(f"{self.architecture}.pooling_type"))
