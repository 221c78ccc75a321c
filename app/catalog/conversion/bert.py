"""
BERT encoders: converts a checkpoint of sentence-transformers to a GGUF file for llama.cpp.

A checkpoint is a folder with `config.json`, `vocab.txt` (WordPiece), `model.safetensors` and `1_Pooling/config.json`.
No code of it is run. What this module does not know is refused with its name: another architecture, activation or
tensor would give a file that loads and computes wrong vectors.
One tensor is in memory at a time. The same checkpoint gives the same bytes.

Names of tensors and keys are those of llama.cpp's convert_hf_to_gguf.py. Matrices are stored as F16, which changes a
vector by less than the six decimals of an `embed` step show; everything else as F32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from app.catalog.conversion.safetensors import Checkpoint
from app.kernel.errors import ModelFileDamaged, ModelFileMissing, ModelUnsupported

#: Files of a checkpoint that are read.
CONFIGURATION, VOCABULARY, WEIGHTS, POOLING = "config.json", "vocab.txt", "model.safetensors", "1_Pooling/config.json"

#: Maximum bytes of a configuration and of a vocabulary, maximum tokens, and maximum of every other number.
_MAX_JSON_BYTES, _MAX_VOCABULARY_BYTES, _MAX_TOKENS, _MAX_NUMBER = 1 << 20, 1 << 24, 1 << 20, 1 << 20
_MAX_LAYERS = 256
#: A space as the vocabularies of llama.cpp write it; WordPiece marks the tokens that continue a word instead.
_WORD, _CONTINUED = "\u2581", "##"
_UNKNOWN = "[UNK]"
_SPECIAL = ("[CLS]", "[SEP]", "[PAD]", _UNKNOWN, "[MASK]")

#: Tensors outside of the layers, and in each of them, without `.weight` and `.bias`: the name in the checkpoint, and in
#: GGUF. A matrix of a layer has both; the embeddings are matrices without a bias.
_EMBEDDINGS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.position_embeddings": "position_embd",
}
_NORM = ("embeddings.LayerNorm", "token_embd_norm")
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
#: Embeddings that llama.cpp adds to others and reads as F32.
_ADDED = {"token_types", "position_embd"}
#: Tensors that an embedding does not need: the pooler is trained for classification.
_UNUSED = ("pooler.", "embeddings.position_ids")

#: Receives the bytes of the checkpoint that are converted so far, and their total.
OnConverted = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Shape:
    """The numbers of a BERT encoder."""

    vocabulary: int
    positions: int
    types: int
    width: int
    inner: int
    layers: int
    heads: int
    epsilon: float


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor that is written: its names, and its shape in numpy's order."""

    source: str
    target: str
    shape: tuple[int, ...]
    half: bool


def convert(folder: Path, target: Path, name: str, report: OnConverted = lambda _done, _total: None) -> None:
    """
    Writes the model of the checkpoint in `folder` to the GGUF file `target`. `name` is stored in the file.

    Raises ModelFileMissing, ModelFileDamaged and ModelUnsupported with the file and the reason. `target` may then exist
    and is not complete.
    """
    shape = _shape(folder)
    writer = gguf.GGUFWriter(target, "bert")
    try:
        _add_keys(writer, shape, name, _pooling(folder))
        _add_vocabulary(writer, folder, shape)
        with _opened(folder / WEIGHTS) as file:
            checkpoint = Checkpoint(folder / WEIGHTS, file)
            planned = _plan(folder, checkpoint, shape)
            for one in planned:
                kind = np.dtype(np.float16 if one.half else np.float32)
                writer.add_tensor_info(one.target, one.shape, kind, int(np.prod(one.shape)) * kind.itemsize)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            total = sum(checkpoint.tensors[one.source].end - checkpoint.tensors[one.source].begin for one in planned)
            done = 0
            for one in planned:
                values = checkpoint.read(one.source)
                writer.write_tensor_data(values.astype(np.float16) if one.half else values)
                done += checkpoint.tensors[one.source].end - checkpoint.tensors[one.source].begin
                report(done, total)
    finally:
        writer.close()


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise ModelFileMissing(f"there is no file {path}") from None


def _json(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        text = file.read(_MAX_JSON_BYTES + 1)
    try:
        value = json.loads(text) if len(text) <= _MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelFileDamaged(path, "it is not a JSON object of a usual size", file_format="JSON")
    return value


def _shape(folder: Path) -> _Shape:
    path = folder / CONFIGURATION
    given = _json(path)
    for key, accepted in (
        ("model_type", "bert"),
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
    ):
        if given.get(key, "absolute" if key == "position_embedding_type" else None) != accepted:
            raise ModelUnsupported(path, f"its {key} is {str(given.get(key))[:80]!r}; only {accepted!r} is converted")

    def number(key: str, most: int = _MAX_NUMBER) -> int:
        value = given.get(key)
        if type(value) is not int or not 1 <= value <= most:
            raise ModelFileDamaged(path, f"{key} is {str(value)[:80]}; 1 to {most:,} are possible", file_format="JSON")
        return value

    epsilon = given.get("layer_norm_eps")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ModelFileDamaged(path, "layer_norm_eps is not a small positive number", file_format="JSON")
    return _Shape(
        vocabulary=number("vocab_size", _MAX_TOKENS),
        positions=number("max_position_embeddings"),
        types=number("type_vocab_size"),
        width=number("hidden_size"),
        inner=number("intermediate_size"),
        layers=number("num_hidden_layers", _MAX_LAYERS),
        heads=number("num_attention_heads"),
        epsilon=epsilon,
    )


def _pooling(folder: Path) -> gguf.PoolingType:
    path = folder / POOLING
    modes = {key for key, value in _json(path).items() if key.startswith("pooling_mode_") and value is True}
    known: Mapping[str, gguf.PoolingType] = {
        "pooling_mode_mean_tokens": gguf.PoolingType.MEAN,
        "pooling_mode_cls_token": gguf.PoolingType.CLS,
    }
    if len(modes) != 1 or not modes <= known.keys():
        raise ModelUnsupported(path, f"its pooling is {sorted(modes)}; one of {', '.join(known)} is converted")
    return known[modes.pop()]


def _add_keys(writer: Any, shape: _Shape, name: str, pooling: gguf.PoolingType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.inner)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_eps(shape.epsilon)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_token_type_count(shape.types)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: Any, folder: Path, shape: _Shape) -> None:
    path = folder / VOCABULARY
    with _opened(path) as file:
        data = file.read(_MAX_VOCABULARY_BYTES + 1)
    if len(data) > _MAX_VOCABULARY_BYTES:
        raise ModelFileDamaged(path, f"it has more than {_MAX_VOCABULARY_BYTES:,} bytes", file_format="vocabulary")
    try:
        tokens = data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ModelFileDamaged(path, f"it is not UTF-8 (byte {error.start})", file_format="vocabulary") from None
    if len(tokens) != shape.vocabulary:
        reason = f"it has {len(tokens):,} tokens, and {CONFIGURATION} says {shape.vocabulary:,}"
        raise ModelFileDamaged(path, reason, file_format="vocabulary")
    numbers = {token: number for number, token in enumerate(tokens)}
    if missing := [token for token in _SPECIAL if token not in numbers]:
        raise ModelFileDamaged(path, f"it has no token {missing[0]}", file_format="vocabulary")
    listed = [_listed(token) for token in tokens]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_bos_token_id(numbers["[CLS]"])
    writer.add_eos_token_id(numbers["[SEP]"])
    writer.add_sep_token_id(numbers["[SEP]"])
    writer.add_pad_token_id(numbers["[PAD]"])
    writer.add_unk_token_id(numbers["[UNK]"])
    writer.add_mask_token_id(numbers["[MASK]"])


def _listed(token: str) -> tuple[str, gguf.TokenType]:
    """Returns the text of a token as llama.cpp stores it, and its type."""
    if token.startswith("[") and token.endswith("]"):
        if token == _UNKNOWN:
            return token, gguf.TokenType.UNKNOWN
        return token, gguf.TokenType.CONTROL if token in _SPECIAL else gguf.TokenType.UNUSED
    if token.startswith(_CONTINUED):
        return token.removeprefix(_CONTINUED), gguf.TokenType.NORMAL
    return _WORD + token, gguf.TokenType.NORMAL


def _plan(folder: Path, checkpoint: Checkpoint, shape: _Shape) -> list[_Planned]:
    """Returns the tensors to write. Raises an error unless the checkpoint has exactly those of this encoder."""
    path, found = folder / WEIGHTS, checkpoint.tensors
    planned = list(_expected(shape))
    for one in planned:
        if one.source not in found:
            raise ModelFileDamaged(path, f"it has no tensor {one.source}", file_format="safetensors")
        if found[one.source].shape != one.shape:
            reason = (
                f"its tensor {one.source} has the shape {found[one.source].shape}, {CONFIGURATION} says {one.shape}"
            )
            raise ModelFileDamaged(path, reason, file_format="safetensors")
    known = {one.source for one in planned}
    if other := sorted(name for name in found.keys() - known if not name.startswith(_UNUSED)):
        raise ModelUnsupported(path, f"its tensor {other[0][:80]!r} is not part of a BERT encoder")
    return planned


def _expected(shape: _Shape) -> Iterator[_Planned]:
    rows = {"token_embd": shape.vocabulary, "token_types": shape.types, "position_embd": shape.positions}
    for source, target in _EMBEDDINGS.items():
        size = (rows[target], shape.width)
        yield _Planned(f"{source}.weight", f"{target}.weight", size, half=target not in _ADDED)
    for part in ("weight", "bias"):
        yield _Planned(f"{_NORM[0]}.{part}", f"{_NORM[1]}.{part}", (shape.width,), half=False)
    widths = {"ffn_up": (shape.inner, shape.width), "ffn_down": (shape.width, shape.inner)}
    for layer in range(shape.layers):
        for source, target in _LAYER.items():
            matrix = not target.endswith("_norm")
            size = widths.get(target, (shape.width, shape.width))
            names = f"encoder.layer.{layer}.{source}", f"blk.{layer}.{target}"
            yield _Planned(f"{names[0]}.weight", f"{names[1]}.weight", size if matrix else size[:1], half=matrix)
            yield _Planned(f"{names[0]}.bias", f"{names[1]}.bias", size[:1], half=False)
