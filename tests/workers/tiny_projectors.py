"""
Tiny projectors with random weights, and the text model of M-RoPE that belongs to one of them.

No trained vision model is small enough for the suite. These have the shapes that llama.cpp's library expects, so that
every part of the way of an image is real; what the models write is meaningless.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import numpy as np

#: mlp: LLaVA, an image is one chunk. idefics3: SmolVLM, slices with tokens between them. gemma3: attention that is not
#: causal. qwen2vl: positions in two dimensions.
ProjectorKind = Literal["mlp", "idefics3", "gemma3", "qwen2vl"]

#: Sizes of the encoder: width, heads, layers, pixels of a side, and pixels of a side of a patch.
_WIDTH, _HEADS, _LAYERS, _IMAGE, _PATCH = 32, 2, 1, 56, 14


def write_projector(target: Path, kind: ProjectorKind, text_width: int, seed: int = 5) -> Path:
    """Write a projector for a text model of this width."""
    writer = gguf.GGUFWriter(target, "clip")
    writer.add_type("mmproj")
    names = {"qwen2vl": "qwen2vl_merger"}
    writer.add_string("clip.projector_type", names.get(kind, kind))
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "embedding_length": _WIDTH, "feed_forward_length": 2 * _WIDTH, "block_count": _LAYERS,
        "projection_dim": text_width, "attention.head_count": _HEADS, "image_size": _IMAGE, "patch_size": _PATCH,
    }.items():  # fmt: skip
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    numbers = np.random.default_rng(seed)

    def random(name: str, *shape: int) -> None:
        writer.add_tensor(name, (numbers.standard_normal(shape) * 0.3).astype(np.float32))

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(size, np.float32))

    random("v.patch_embd.weight", _WIDTH, 3, _PATCH, _PATCH)
    if kind == "qwen2vl":
        random("v.patch_embd.weight.1", _WIDTH, 3, _PATCH, _PATCH)
    else:
        random("v.position_embd.weight", (_IMAGE // _PATCH) ** 2, _WIDTH)
        random("v.patch_embd.bias", _WIDTH)
    for layer in range(_LAYERS):
        block = f"v.blk.{layer}."
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            random(f"{block}{part}.weight", _WIDTH, _WIDTH)
            random(f"{block}{part}.bias", _WIDTH)
        for part, rows, columns in (("ffn_up", 2 * _WIDTH, _WIDTH), ("ffn_down", _WIDTH, 2 * _WIDTH)):
            random(f"{block}{part}.weight", rows, columns)
            random(f"{block}{part}.bias", rows)
        norm(f"{block}ln1", _WIDTH)
        norm(f"{block}ln2", _WIDTH)
    norm("v.post_ln", _WIDTH)
    match kind:
        case "mlp":
            for number, columns in ((0, _WIDTH), (2, text_width)):
                random(f"mm.{number}.weight", text_width, columns)
                random(f"mm.{number}.bias", text_width)
        case "idefics3":
            writer.add_uint32("clip.vision.projector.scale_factor", 2)
            writer.add_uint32("clip.vision.preproc_image_size", 2 * _IMAGE)
            random("mm.model.fc.weight", text_width, 4 * _WIDTH)
        case "gemma3":
            writer.add_uint32("clip.vision.projector.scale_factor", 2)
            random("mm.input_projection.weight", _WIDTH, text_width)
            writer.add_tensor("mm.soft_emb_norm.weight", np.ones(_WIDTH, np.float32))
        case "qwen2vl":
            for number, rows in ((0, 4 * _WIDTH), (2, text_width)):
                random(f"mm.{number}.weight", rows, 4 * _WIDTH)
                random(f"mm.{number}.bias", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
