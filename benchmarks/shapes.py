"""
Models of well-known shapes without their weights: GGUF files that are a header and a hole.

llama.cpp's dry run needs the header alone, so its figures for a model of 30 billion weights can be had on any machine,
in a file that takes a few kilobytes of the disk. The vocabulary is a number here, not a list of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as T
from gguf.quants import quant_shape_to_byte_shape

#: Name to a function that fills a writer.
SHAPES: dict[str, Callable[[_Shape], None]] = {}


class _Shape:
    """A writer that knows the names of keys and tensors."""

    def __init__(self, path: Path, architecture: str) -> None:
        self.writer = gguf.GGUFWriter(path, architecture)
        self.architecture = architecture
        self.writer.add_string("tokenizer.ggml.model", "no_vocab")

    def keys(self, **values: Any) -> None:
        """Keys of the architecture; `__` stands for a dot."""
        for name, value in values.items():
            key = f"{self.architecture}.{name.replace('__', '.')}"
            if isinstance(value, bool):
                self.writer.add_bool(key, value)
            elif isinstance(value, float):
                self.writer.add_float32(key, value)
            elif isinstance(value, list):
                self.writer.add_array(key, value)
            elif isinstance(value, str):
                self.writer.add_string(key, value)
            else:
                self.writer.add_uint32(key, value)

    def tensor(self, name: str, *shape: int, kind: T | None = None) -> None:
        """A tensor; shapes in ggml's order. Matrices are quantised, the rest is not."""
        if kind is None:
            plain = len(shape) < 2 or shape[0] % 32 or name.endswith(".bias")
            kind = T.F32 if plain else T.Q4_K if shape[0] % 256 == 0 else T.Q8_0
        block, size = gguf.GGML_QUANT_SIZES[kind]
        logical = tuple(reversed(shape))
        count = int(np.prod(logical, dtype=np.int64)) // block * size
        if kind is T.F32:
            self.writer.add_tensor_info(name, logical, np.dtype(np.float32), count)
        else:
            given = quant_shape_to_byte_shape(logical, kind)
            self.writer.add_tensor_info(name, given, np.dtype(np.uint8), count, raw_dtype=kind)

    def block(self, layer: int, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """The tensors of a layer."""
        for name, shape in tensors.items():
            suffix = "" if "." in name or name in {"ssm_a", "ssm_d"} else ".weight"
            self.tensor(f"blk.{layer}.{name}{suffix}", *shape)

    def close(self, path: Path) -> None:
        """Write the header, and leave a hole for the data."""
        writer = self.writer
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        start = sum(file.tell() for file in writer.fout)
        data = sum(-(-info.nbytes // 32) * 32 for table in writer.tensors for info in table.values())
        writer.fout[0].truncate(-(-start // 32) * 32 + data)
        writer.close()


def write(name: str, folder: Path) -> Path:
    """The file of that shape, in `folder`."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        SHAPES[name](path)
    return path


def _dense(
    name: str,
    architecture: str,
    *,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    feed: int,
    vocabulary: int,
    head: int | None = None,
    tied: bool = False,
    extra: Mapping[str, tuple[int, ...]] | None = None,
    experts: tuple[int, int, int] | None = None,
    fused: bool = False,
    without: frozenset[str] = frozenset(),
    keys: Mapping[str, Any] | None = None,
) -> None:
    """A decoder of equal layers. `experts` are their count, how many are used, and the width of one."""
    head = head or width // heads

    def make(path: Path) -> None:
        shape = _Shape(path, architecture)
        shape.keys(
            context_length=131072, embedding_length=width, block_count=layers, feed_forward_length=feed,
            vocab_size=vocabulary, attention__head_count=heads, attention__head_count_kv=kv_heads,
            attention__key_length=head, attention__value_length=head, attention__layer_norm_rms_epsilon=1e-5,
            rope__dimension_count=head, **(keys or {}),
        )  # fmt: skip
        if experts:
            shape.keys(expert_count=experts[0], expert_used_count=experts[1], expert_feed_forward_length=experts[2])
        shape.tensor("token_embd.weight", width, vocabulary, kind=T.Q6_K if width % 256 == 0 else T.Q8_0)
        shape.tensor("output_norm.weight", width)
        if "attn_norm.bias" in (extra or {}):
            shape.tensor("output_norm.bias", width)
        if not tied:
            shape.tensor("output.weight", width, vocabulary, kind=T.Q6_K if width % 256 == 0 else T.Q8_0)
        block: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "ffn_norm": (width,)}
        if fused:
            block |= {"attn_qkv": (width, (heads + 2 * kv_heads) * head), "ffn_up": (width, 2 * feed)}
        else:
            block |= {
                "attn_q": (width, heads * head), "attn_k": (width, kv_heads * head), "attn_v": (width, kv_heads * head)
            }  # fmt: skip
        block["attn_output"] = (heads * head, width)
        if experts:
            count, _, inner = experts
            block |= {
                "ffn_gate_inp": (width, count), "ffn_gate_exps": (width, inner, count),
                "ffn_up_exps": (width, inner, count), "ffn_down_exps": (inner, width, count),
            }  # fmt: skip
        else:
            block["ffn_down"] = (feed, width)
            if not fused:
                block |= {"ffn_gate": (width, feed), "ffn_up": (width, feed)}
        for layer in range(layers):
            tensors = {name: size for name, size in (block | dict(extra or {})).items() if name not in without}
            shape.block(layer, tensors)
        shape.close(path)

    SHAPES[name] = make


_dense("llama-3.1-8b", "llama", width=4096, layers=32, heads=32, kv_heads=8, feed=14336, vocabulary=128256)
_dense("llama-3.2-1b", "llama", width=2048, layers=16, heads=32, kv_heads=8, feed=8192, vocabulary=128256, tied=True)
_dense("llama-3.1-70b", "llama", width=8192, layers=80, heads=64, kv_heads=8, feed=28672, vocabulary=128256)
_dense("mistral-7b", "llama", width=4096, layers=32, heads=32, kv_heads=8, feed=14336, vocabulary=32768)
_dense(
    "mixtral-8x7b", "llama", width=4096, layers=32, heads=32, kv_heads=8, feed=14336, vocabulary=32000,
    experts=(8, 2, 14336),
)  # fmt: skip
_dense(
    "qwen2.5-7b", "qwen2", width=3584, layers=28, heads=28, kv_heads=4, feed=18944, vocabulary=152064,
    extra={"attn_q.bias": (3584,), "attn_k.bias": (512,), "attn_v.bias": (512,)},
)  # fmt: skip
_dense(
    "qwen3-0.6b", "qwen3", width=1024, layers=28, heads=16, kv_heads=8, feed=3072, vocabulary=151936, head=128,
    tied=True, extra={"attn_q_norm": (128,), "attn_k_norm": (128,)},
)  # fmt: skip
_dense(
    "qwen3-4b", "qwen3", width=2560, layers=36, heads=32, kv_heads=8, feed=9728, vocabulary=151936, head=128, tied=True,
    extra={"attn_q_norm": (128,), "attn_k_norm": (128,)},
)  # fmt: skip
_dense(
    "qwen3-30b-a3b", "qwen3moe", width=2048, layers=48, heads=32, kv_heads=4, feed=6144, vocabulary=151936, head=128,
    experts=(128, 8, 768), extra={"attn_q_norm": (128,), "attn_k_norm": (128,)},
)  # fmt: skip
_dense(
    "gemma-2-9b", "gemma2", width=3584, layers=42, heads=16, kv_heads=8, feed=14336, vocabulary=256000, head=256,
    tied=True, keys={"attention__sliding_window": 4096},
    extra={"post_attention_norm": (3584,), "post_ffw_norm": (3584,)},
)  # fmt: skip
_dense(
    "gemma-3-4b", "gemma3", width=2560, layers=34, heads=8, kv_heads=4, feed=10240, vocabulary=262208, head=256,
    tied=True, keys={"attention__sliding_window": 1024},
    extra={"post_attention_norm": (2560,), "post_ffw_norm": (2560,), "attn_q_norm": (256,), "attn_k_norm": (256,)},
)  # fmt: skip
_dense(
    "phi-3-mini", "phi3", width=3072, layers=32, heads=32, kv_heads=32, feed=8192, vocabulary=32064, fused=True,
    keys={"rope__scaling__original_context_length": 4096},
)  # fmt: skip
_dense(
    "gpt-oss-20b", "gpt-oss", width=2880, layers=24, heads=64, kv_heads=8, feed=2880, vocabulary=201088, head=64,
    experts=(32, 4, 2880), without=frozenset({"ffn_norm"}), keys={"attention__sliding_window": 128},
    extra={
        "post_attention_norm": (2880,), "attn_sinks": (64,), "attn_q.bias": (4096,), "attn_k.bias": (512,),
        "attn_v.bias": (512,), "attn_output.bias": (2880,), "ffn_gate_inp.bias": (32,),
        "ffn_gate_exps.bias": (2880, 32), "ffn_up_exps.bias": (2880, 32), "ffn_down_exps.bias": (2880, 32),
    },
)  # fmt: skip
_dense(
    "olmoe-1b-7b", "olmoe", width=2048, layers=16, heads=16, kv_heads=16, feed=1024, vocabulary=50304,
    experts=(64, 8, 1024), extra={"attn_q_norm": (2048,), "attn_k_norm": (2048,)},
)  # fmt: skip
_dense(
    "command-r7b", "cohere2", width=4096, layers=32, heads=32, kv_heads=8, feed=14336, vocabulary=256000, tied=True,
    without=frozenset({"ffn_norm"}),
    keys={"attention__sliding_window": 4096, "logit_scale": 0.25, "attention__layer_norm_epsilon": 1e-5},
)  # fmt: skip
_dense(
    "starcoder2-7b", "starcoder2", width=4608, layers=32, heads=36, kv_heads=4, feed=18432, vocabulary=49152, tied=True,
    without=frozenset({"ffn_gate"}), keys={"attention__layer_norm_epsilon": 1e-5},
    extra={
        "attn_norm.bias": (4608,), "ffn_norm.bias": (4608,), "attn_output.bias": (4608,), "ffn_down.bias": (4608,),
        "ffn_up.bias": (18432,), "attn_q.bias": (4608,), "attn_k.bias": (512,), "attn_v.bias": (512,),
    },
)  # fmt: skip


def _qwen_next(path: Path) -> None:
    """Qwen3 Next 80B: three layers of four keep a state (gated delta net), 512 experts."""
    width, layers, heads, kv, head, experts, inner, vocabulary = 2048, 48, 16, 2, 256, 512, 512, 151936
    state, k_heads, v_heads, kernel = 128, 16, 32, 4
    key, value = state * k_heads, state * v_heads
    shape = _Shape(path, "qwen3next")
    shape.keys(
        context_length=262144, embedding_length=width, block_count=layers, feed_forward_length=5120,
        vocab_size=vocabulary,
        attention__head_count=heads, attention__head_count_kv=kv, attention__key_length=head,
        attention__value_length=head, attention__layer_norm_rms_epsilon=1e-6, rope__dimension_count=64,
        expert_count=experts, expert_used_count=10, expert_feed_forward_length=inner,
        expert_shared_feed_forward_length=inner, ssm__conv_kernel=kernel, ssm__inner_size=value, ssm__state_size=state,
        ssm__time_step_rank=v_heads, ssm__group_count=k_heads,
    )  # fmt: skip
    shape.tensor("token_embd.weight", width, vocabulary)
    shape.tensor("output_norm.weight", width)
    shape.tensor("output.weight", width, vocabulary, kind=T.Q6_K)
    for layer in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,), "post_attention_norm": (width,), "ffn_gate_inp": (width, experts),
            "ffn_gate_exps": (width, inner, experts), "ffn_up_exps": (width, inner, experts),
            "ffn_down_exps": (inner, width, experts), "ffn_gate_inp_shexp": (width,), "ffn_gate_shexp": (width, inner),
            "ffn_up_shexp": (width, inner), "ffn_down_shexp": (inner, width),
        }  # fmt: skip
        if (layer + 1) % 4 == 0:
            block |= {
                "attn_q": (width, 2 * heads * head), "attn_k": (width, kv * head), "attn_v": (width, kv * head),
                "attn_output": (heads * head, width), "attn_q_norm": (head,), "attn_k_norm": (head,),
            }  # fmt: skip
        else:
            block |= {
                "attn_qkv": (width, 2 * key + value), "attn_gate": (width, value),
                "ssm_conv1d": (kernel, 2 * key + value),
                "ssm_dt.bias": (v_heads,), "ssm_a": (v_heads,), "ssm_ba": (width, 2 * v_heads), "ssm_norm": (state,),
                "ssm_out": (value, width),
            }  # fmt: skip
        shape.block(layer, block)
    shape.close(path)


def _deepseek(path: Path) -> None:
    """DeepSeek V2 Lite: attention on a compressed cache (MLA), experts."""
    width, layers, heads, rank, rope, plain, value = 2048, 27, 16, 512, 64, 128, 128
    shape = _Shape(path, "deepseek2")
    shape.keys(
        context_length=163840, embedding_length=width, block_count=layers, feed_forward_length=10944,
        vocab_size=102400,
        attention__head_count=heads, attention__head_count_kv=1, attention__key_length=rank + rope,
        attention__value_length=rank, attention__key_length_mla=plain + rope, attention__value_length_mla=value,
        attention__kv_lora_rank=rank, attention__layer_norm_rms_epsilon=1e-6, rope__dimension_count=rope,
        leading_dense_block_count=1, expert_count=64, expert_used_count=6, expert_feed_forward_length=1408,
        expert_shared_count=2, expert_weights_scale=1.0,
    )  # fmt: skip
    shape.tensor("token_embd.weight", width, 102400)
    shape.tensor("output_norm.weight", width)
    shape.tensor("output.weight", width, 102400, kind=T.Q6_K)
    for layer in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,), "attn_kv_a_norm": (rank,), "attn_q": (width, heads * (plain + rope)),
            "attn_kv_a_mqa": (width, rank + rope), "attn_k_b": (plain, rank, heads), "attn_v_b": (rank, value, heads),
            "attn_output": (heads * value, width), "ffn_norm": (width,),
        }  # fmt: skip
        if layer == 0:
            block |= {"ffn_gate": (width, 10944), "ffn_up": (width, 10944), "ffn_down": (10944, width)}
        else:
            block |= {
                "ffn_gate_inp": (width, 64), "ffn_gate_exps": (width, 1408, 64), "ffn_up_exps": (width, 1408, 64),
                "ffn_down_exps": (1408, width, 64), "ffn_gate_shexp": (width, 2816), "ffn_up_shexp": (width, 2816),
                "ffn_down_shexp": (2816, width),
            }  # fmt: skip
        shape.block(layer, block)
    shape.close(path)


def _mamba(path: Path) -> None:
    """Mamba 2, 2.7 billion: a state for each sequence, no cache."""
    width, layers, inner, state, groups, heads, kernel = 2560, 64, 5120, 128, 1, 80, 4
    shape = _Shape(path, "mamba2")
    shape.keys(
        context_length=1048576, embedding_length=width, block_count=layers, feed_forward_length=0, vocab_size=50288,
        attention__head_count=0, attention__layer_norm_rms_epsilon=1e-5, ssm__conv_kernel=kernel, ssm__inner_size=inner,
        ssm__state_size=state, ssm__time_step_rank=heads, ssm__group_count=groups,
    )  # fmt: skip
    shape.tensor("token_embd.weight", width, 50288)
    shape.tensor("output_norm.weight", width)
    mixed = inner + 2 * groups * state
    for layer in range(layers):
        shape.block(
            layer,
            {
                "attn_norm": (width,), "ssm_in": (width, inner + mixed + heads), "ssm_conv1d": (kernel, mixed),
                "ssm_conv1d.bias": (mixed,), "ssm_dt.bias": (heads,), "ssm_a": (1, heads), "ssm_d": (1, heads),
                "ssm_norm": (inner // groups, groups), "ssm_out": (inner, width),
            },
        )  # fmt: skip
    shape.close(path)


def _granite(path: Path) -> None:
    """Granite 4 tiny: most layers keep a state, some a cache; experts."""
    width, layers, inner, state, groups, ssm_heads, kernel = 1536, 40, 3072, 128, 1, 48, 4
    heads, kv, head, feed, shared, experts = 12, 4, 128, 512, 1024, 64
    attention = {5, 15, 25, 35}
    shape = _Shape(path, "granitehybrid")
    shape.keys(
        context_length=131072, embedding_length=width, block_count=layers, feed_forward_length=feed, vocab_size=100352,
        attention__head_count=heads, attention__head_count_kv=[kv if n in attention else 0 for n in range(layers)],
        attention__key_length=head, attention__value_length=head, attention__layer_norm_rms_epsilon=1e-5,
        rope__dimension_count=head, ssm__conv_kernel=kernel, ssm__inner_size=inner, ssm__state_size=state,
        ssm__time_step_rank=ssm_heads, ssm__group_count=groups, expert_count=experts, expert_used_count=6,
        expert_shared_feed_forward_length=shared,
    )  # fmt: skip
    shape.tensor("token_embd.weight", width, 100352)
    shape.tensor("output_norm.weight", width)
    mixed = inner + 2 * groups * state
    for layer in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,), "ffn_norm": (width,), "ffn_gate_inp": (width, experts),
            "ffn_gate_exps": (width, feed, experts), "ffn_up_exps": (width, feed, experts),
            "ffn_down_exps": (feed, width, experts), "ffn_gate_shexp": (width, shared), "ffn_up_shexp": (width, shared),
            "ffn_down_shexp": (shared, width),
        }  # fmt: skip
        if layer in attention:
            block |= {
                "attn_q": (width, heads * head), "attn_k": (width, kv * head), "attn_v": (width, kv * head),
                "attn_output": (heads * head, width),
            }  # fmt: skip
        else:
            block |= {
                "ssm_in": (width, inner + mixed + ssm_heads), "ssm_conv1d": (kernel, mixed),
                "ssm_conv1d.bias": (mixed,),
                "ssm_dt.bias": (ssm_heads,), "ssm_a": (1, ssm_heads), "ssm_d": (1, ssm_heads),
                "ssm_norm": (inner // groups, groups), "ssm_out": (inner, width),
            }  # fmt: skip
        shape.block(layer, block)
    shape.close(path)


def _lfm(path: Path) -> None:
    """LFM2 1.2B: short convolutions between layers of attention."""
    width, layers, heads, kv, head, feed, kernel = 2048, 16, 32, 8, 64, 8192, 3
    attention = {2, 5, 8, 10, 12, 14}
    shape = _Shape(path, "lfm2")
    shape.keys(
        context_length=128000, embedding_length=width, block_count=layers, feed_forward_length=feed, vocab_size=65536,
        attention__head_count=heads, attention__head_count_kv=[kv if n in attention else 0 for n in range(layers)],
        attention__layer_norm_rms_epsilon=1e-5, shortconv__l_cache=kernel,
    )  # fmt: skip
    shape.tensor("token_embd.weight", width, 65536)
    shape.tensor("token_embd_norm.weight", width)
    for layer in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,), "ffn_norm": (width,), "ffn_gate": (width, feed), "ffn_up": (width, feed),
            "ffn_down": (feed, width),
        }  # fmt: skip
        if layer in attention:
            block |= {
                "attn_q": (width, heads * head), "attn_k": (width, kv * head), "attn_v": (width, kv * head),
                "attn_output": (heads * head, width), "attn_q_norm": (head,), "attn_k_norm": (head,),
            }  # fmt: skip
        else:
            block |= {
                "shortconv.conv.weight": (kernel, width), "shortconv.in_proj.weight": (width, 3 * width),
                "shortconv.out_proj.weight": (width, width),
            }  # fmt: skip
        shape.block(layer, block)
    shape.close(path)


def _encoder(name: str, architecture: str, width: int, layers: int, heads: int, feed: int, context: int) -> None:
    """A model that embeds: no cache, a mean or the first token at the end."""

    def make(path: Path) -> None:
        shape = _Shape(path, architecture)
        shape.keys(
            context_length=context, embedding_length=width, block_count=layers, feed_forward_length=feed,
            vocab_size=30522, attention__head_count=heads, attention__layer_norm_epsilon=1e-12,
            attention__causal=False, pooling_type=1,
        )  # fmt: skip
        shape.writer.add_uint32("tokenizer.ggml.token_type_count", 2)
        shape.tensor("token_embd.weight", width, 30522)
        shape.tensor("token_types.weight", width, 2, kind=T.F32)
        if architecture == "bert":
            shape.tensor("position_embd.weight", width, context, kind=T.F32)
        shape.tensor("token_embd_norm.weight", width)
        shape.tensor("token_embd_norm.bias", width)
        block: dict[str, tuple[int, ...]] = {
            "attn_output": (width, width), "attn_output_norm": (width,), "attn_output_norm.bias": (width,),
            "ffn_up": (width, feed), "ffn_down": (feed, width), "layer_output_norm": (width,),
            "layer_output_norm.bias": (width,),
        }  # fmt: skip
        if architecture == "bert":
            block |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (width, width))
            block |= {f"{part}.bias": (width,) for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")}
            block["ffn_up.bias"] = (feed,)
        else:
            block |= {"attn_qkv": (width, 3 * width), "ffn_gate": (width, feed)}
        for layer in range(layers):
            shape.block(layer, block)
        shape.close(path)

    SHAPES[name] = make


_encoder("bge-base", "bert", 768, 12, 12, 3072, 512)
_encoder("nomic-embed-1.5", "nomic-bert", 768, 12, 12, 3072, 2048)
SHAPES |= {"deepseek-v2-lite": _deepseek, "mamba2-2.7b": _mamba, "granite-4-tiny": _granite, "lfm2-1.2b": _lfm}
SHAPES["qwen3-next-80b"] = _qwen_next
