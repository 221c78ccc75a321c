"""Products of prompts by a BLAS library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp as api
import numpy as np
import numpy.typing as npt
import pytest

from workers.engine.bindings import gemm
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.options import EngineOptions

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and os.uname().machine == "x86_64"), reason="it is for Linux on x86-64"
)

#: More than the block of rows, and no multiple of a tile.
TOKENS = [7 + 13 * number % 40_000 for number in range(201)]


@pytest.fixture(scope="module", params=["Q4_1", "Q5_1"])
def quantised(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers, whose weights have the type."""
    target = tmp_path_factory.mktemp("quantised") / f"{request.param}.gguf"
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{request.param}")
    params.nthread = 1
    assert api.llama_model_quantize(os.fsencode(tiny_llama), os.fsencode(target), params) == 0
    return target


def last_logits(path: Path, decode: int, threads: int = 1) -> npt.NDArray[np.float32]:
    """The logits after TOKENS, computed so many at a time."""
    options = EngineOptions(slots=1, context=512, threads=threads, threads_batch=threads, vectors=False)
    model = LlamaModel(path, options)
    context = Context(model, options)
    for first in range(0, len(TOKENS), decode):
        assert context.decode([(0, first, TOKENS[first : first + decode], 1)]) == 0
    logits = context.logits(1)[0].copy()
    context.close()
    model.close()
    return logits


def test_the_library_is_built_and_used() -> None:
    assert gemm.load()


def test_the_logits_are_those_of_the_kernels(quantised: Path, model_path: Path) -> None:
    """Decodes of 32 tokens are computed by llama.cpp's kernels, which round the activations to eight bits."""
    for path in (quantised, model_path):
        expected, found = last_logits(path, 32), last_logits(path, len(TOKENS))
        assert not np.array_equal(expected, found), "the same kernels computed both"
        assert np.corrcoef(expected, found)[0, 1] > 0.99
        assert np.abs(expected - found).max() < 0.1 * np.abs(expected).max()


def test_the_logits_do_not_depend_on_the_number_of_threads(quantised: Path, model_path: Path) -> None:
    for path in (quantised, model_path):
        one = last_logits(path, len(TOKENS))
        assert all(np.array_equal(one, last_logits(path, len(TOKENS), threads)) for threads in (2, 3))


def test_without_openblas_or_the_library_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not gemm._load.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(gemm, "_LIBRARY", tmp_path / "missing.so")
    assert not gemm._load.__wrapped__()


def test_a_library_that_is_none_is_reported_and_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged.so").write_bytes(b"no library")
    monkeypatch.setattr(gemm, "_LIBRARY", tmp_path / "damaged.so")
    assert not gemm._load.__wrapped__()


def test_openblas_starts_no_threads() -> None:
    code = """
import psutil
from workers.engine.bindings import gemm, native
native.start()
before = psutil.Process().num_threads()
assert gemm.load()
assert psutil.Process().num_threads() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
