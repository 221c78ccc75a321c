"""
Model metadata: the contents of a model file's header, as values.

The module `header` reads them. Nothing here opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table."""

    name: str
    #: The name in the package `gguf`: `Q4_K`, `F32`.
    type: str
    #: Elements in each dimension, in ggml's order: the first is the length of a row.
    shape: tuple[int, ...]
    #: Bytes of the data, without padding.
    size: int

    @property
    def elements(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a model. A number that is absent from the file is None."""

    #: The file, or all parts of a split model in order.
    parts: tuple[Path, ...]
    version: int
    #: The name of the model, or else of its file.
    name: str
    architecture: str
    #: `model`, `adapter`, `mmproj` or `imatrix`: from `general.type`, or else from the architecture.
    kind: str
    #: The name in llama.cpp: `Q4_K_M`; without such a name, the tensor type with the most bytes.
    quantisation: str
    #: The size as the publisher writes it: `135M`.
    size_label: str | None
    licence: str | None
    #: Context length of the training, in tokens.
    context_length: int | None
    layers: int | None
    embedding_length: int | None
    #: Attention heads of each layer; 0 in a layer without attention.
    heads: tuple[int, ...]
    #: KV heads of each layer.
    kv_heads: tuple[int, ...]
    #: Values in the key of one head, and in its value.
    key_length: int | None
    value_length: int | None
    #: Tokens in the attention window of sliding-window layers; None without such layers.
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
    #: Equal for two models only if their headers are equal: they then use the same memory, whatever their weights are.
    digest: str
    tensors: tuple[Tensor, ...] = field(repr=False)
    #: Every key except the lists of the tokenizer and other long arrays.
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def path(self) -> Path:
        """The file that llama.cpp loads: the first part."""
        return self.parts[0]

    @property
    def has_pooling_type(self) -> bool:
        """Whether the file defines a pooling type for embeddings: the model is made for embedding."""
        return bool(self.metadata.get(f"{self.architecture}.pooling_type"))
