"""
The header of a model file: reads what the model is, and the size of its weights, without loading it.

The parts of a split model are read as one model; a missing part is named.
A number that is absent from the file is None, and is not guessed. A number that no model has is rejected with its key.

`gguf_container` reads single files and defines which of them are damaged.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import LlamaFileType

from app.catalog import gguf_container
from app.catalog.gguf_container import Container
from app.catalog.metadata import Header, Tensor
from app.catalog.source import split_number, split_parts
from app.kernel.errors import ModelFileDamaged, ModelFileMissing
from app.kernel.security import texts

#: Maximum layers: eight times llama.cpp's own limit, LLAMA_MAX_LAYERS.
_MAX_LAYERS = 4096
#: Maximum value: llama.cpp reads every number of an architecture as 32 bits.
_MAX_NUMBER = (1 << 32) - 1
#: Maximum heads of a layer: many times what any model has.
_MAX_HEADS = 1 << 16
#: Maximum characters of names, and of words such as the architecture.
_MAX_NAME, _MAX_WORD = 200, 64


def read(path: Path) -> Header:
    """
    Reads the header of the model in `path`. Of a split model, `path` is the first part; the others are in its folder.

    Raises ModelFileMissing for a missing file or part, and ModelFileDamaged with the reason for a file that cannot be
    served.
    """
    first = gguf_container.read(path)
    count = first.metadata.get("split.count")
    if not isinstance(count, int) or count < 2:
        return _header((first,))
    number = split_number(path.name)
    if number is None or number[1] != count:
        raise ModelFileDamaged(
            path, f"it is one of {count} parts, but its name does not end in -00001-of-{count:05}.gguf"
        )
    if number[0] != 1:
        raise ModelFileDamaged(path, f"it is part {number[0]} of {count}; name the first part")
    others = [path.with_name(name) for name in split_parts(path.name)[1:]]
    if missing := [part.name for part in others if not part.is_file()]:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelFileMissing(f"{path} has {count} parts, but its folder lacks {names}")
    containers = (first, *(gguf_container.read(part) for part in others))
    wanted, found = first.metadata.get("split.tensors.count"), sum(len(container.tensors) for container in containers)
    if isinstance(wanted, int) and wanted != found:
        raise ModelFileDamaged(path, f"it says that the model has {wanted} tensors, but its {count} parts have {found}")
    return _header(containers)


def check(path: Path) -> None:
    """
    Checks that the file is a complete GGUF file, or a complete part of a split model.

    Raises ModelFileMissing or ModelFileDamaged. Other parts, and whether the model can be served, are not checked.
    """
    gguf_container.read(path)


def _header(containers: tuple[Container, ...]) -> Header:
    first = containers[0]
    values = first.metadata
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelFileDamaged(first.path, "it does not name its architecture (general.architecture)")
    if len(architecture) > _MAX_WORD or not (architecture.isascii() and architecture.isprintable()):
        raise ModelFileDamaged(
            first.path, f"its architecture is {gguf_container.quoted(architecture)}; its header is corrupt"
        )
    _check_numbers(first.path, f"{architecture}.", values)

    def number(key: str) -> int | None:
        value = values.get(f"{architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(key: str, most: int = _MAX_NAME) -> str | None:
        value = values.get(key)
        return (_one_line(value, most) or None) if isinstance(value, str) else None

    tensors = tuple(tensor for container in containers for tensor in container.tensors)
    layers = number("block_count")
    if layers is not None and layers > _MAX_LAYERS:
        raise ModelFileDamaged(first.path, f"it says that it has {layers:,} layers; its header is corrupt")
    heads = _heads(first.path, f"{architecture}.attention.head_count", values, layers)
    kv_heads = _heads(first.path, f"{architecture}.attention.head_count_kv", values, layers) or heads
    width, template = number("embedding_length"), values.get("tokenizer.chat_template")
    head_width = width // max(heads) if width and any(heads) else None
    vocabulary = first.lengths.get("tokenizer.ggml.tokens", number("vocab_size"))
    kind = text("general.type", _MAX_WORD) or ("mmproj" if architecture == "clip" else "model")
    return Header(
        parts=tuple(container.path for container in containers),
        version=first.version,
        name=text("general.name") or _one_line(first.path.stem, _MAX_NAME),
        architecture=architecture,
        kind="mmproj" if architecture == "clip" else kind,
        quantisation=_quantisation(values.get("general.file_type"), tensors),
        size_label=text("general.size_label", _MAX_WORD),
        licence=text("general.license"),
        context_length=number("context_length"),
        layers=layers,
        embedding_length=width,
        heads=heads,
        kv_heads=kv_heads,
        key_length=number("attention.key_length") or head_width,
        value_length=number("attention.value_length") or head_width,
        sliding_window=number("attention.sliding_window") or None,
        experts=number("expert_count") or None,
        experts_used=number("expert_used_count") or None,
        tokenizer=text("tokenizer.ggml.model", _MAX_WORD),
        vocabulary=vocabulary,
        chat_template=template if isinstance(template, str) and template else None,
        parameters=sum(tensor.elements for tensor in tensors),
        file_bytes=sum(container.size for container in containers),
        tensor_bytes=sum(tensor.size for tensor in tensors),
        digest=hashlib.sha256("".join(container.digest for container in containers).encode()).hexdigest(),
        tensors=tensors,
        metadata=values,
    )


def _check_numbers(path: Path, prefix: str, values: Mapping[str, Any]) -> None:
    """Rejects numbers of the architecture that no model has: results computed from them would be meaningless."""
    for key, value in values.items():
        if key.startswith(prefix) and isinstance(value, int) and not 0 <= value <= _MAX_NUMBER:
            raise ModelFileDamaged(path, f"it says that {key} is {value:,}; 0 to {_MAX_NUMBER:,} are possible")


def _heads(path: Path, key: str, values: Mapping[str, Any], layers: int | None) -> tuple[int, ...]:
    """Returns one number for each layer; the file has one number for all layers, or a list."""
    value = values.get(key)
    given = value if isinstance(value, tuple) else (value,) * (layers or 1)
    listed = tuple(item for item in given if isinstance(item, int) and not isinstance(item, bool))
    if len(listed) < len(given):
        return ()
    if wrong := next((item for item in listed if not 0 <= item <= _MAX_HEADS), None):
        raise ModelFileDamaged(path, f"it says that {key} is {wrong:,} in a layer; 0 to {_MAX_HEADS:,} are possible")
    return listed


def _one_line(text: str, most: int) -> str:
    return texts.printable(" ".join(text.split()), most)


def _quantisation(file_type: Any, tensors: tuple[Tensor, ...]) -> str:
    if isinstance(file_type, int):
        known = {int(item): item.name for item in LlamaFileType}
        # llama.cpp sets the bit GUESSED when it derived the type from the tensors.
        name = known.get(file_type & ~int(LlamaFileType.GUESSED))
        if name is not None:
            return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.size
    return sizes.most_common(1)[0][0] if sizes else "none"
