"""
The self-test of the engine: it makes a tiny model with random weights, loads it, and generates with it.

It shows that llama.cpp is there, fits this processor, and computes, without a download. What the model writes means
nothing. `arriero self-check` runs it in a process of its own, because a wrong build may end its process.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

from app.inference.requests import GenerateRequest, Sampling
from app.kernel import log
from app.kernel.errors import ArrieroError
from app.kernel.sections.servers import LogSettings
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

#: Numbers of a vector and of the feed-forward layer, and layers.
_WIDTH, _INNER, _LAYERS = 64, 128, 2
_TOKENS, _CONTEXT = 16, 512


def print_self_test() -> int:
    """Run the self-test and print its figures as one JSON document. Returns the exit code."""
    log.configure(LogSettings(level="error"))
    with tempfile.TemporaryDirectory(prefix="arriero-self-test-") as folder:
        path = Path(folder) / "tiny.gguf"
        write_model(path)
        try:
            document = _generate(path)
        except ArrieroError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _generate(path: Path) -> dict[str, float]:
    began = time.perf_counter()
    engine = LlamaEngine(path, EngineOptions(slots=1, context=_CONTEXT, threads=1))
    loaded = time.perf_counter()
    try:
        request = GenerateRequest(prompt="a llama", max_tokens=_TOKENS, sampling=Sampling(temperature=0, seed=1))
        generated = engine.generate(request).result()
    finally:
        engine.close()
    return {
        "bytes": path.stat().st_size,
        "load_seconds": loaded - began,
        "generate_seconds": time.perf_counter() - loaded,
        "tokens": generated.tokens_out,
    }


def write_model(path: Path) -> None:
    """Write a llama of two layers whose vocabulary is the 256 bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(_INNER)
    writer.add_rope_dimension_count(32)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([*kinds, *[gguf.TokenType.BYTE] * 256])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
    random = np.random.default_rng(7)
    shapes = {"token_embd": (len(tokens), _WIDTH)}
    norms = ["output_norm"]
    for layer in range(_LAYERS):
        block = f"blk.{layer}."
        shapes |= {f"{block}attn_q": (_WIDTH, _WIDTH), f"{block}attn_output": (_WIDTH, _WIDTH)}
        shapes |= {f"{block}attn_k": (32, _WIDTH), f"{block}attn_v": (32, _WIDTH)}
        shapes |= {f"{block}ffn_gate": (_INNER, _WIDTH), f"{block}ffn_up": (_INNER, _WIDTH)}
        shapes |= {f"{block}ffn_down": (_WIDTH, _INNER)}
        norms += [f"{block}attn_norm", f"{block}ffn_norm"]
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.25).astype(np.float32))
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
