"""Products of quantised weights: beside exact ones, and the logits of models."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import llama_cpp as api
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from benchmarks.products import Backend, Floats, Product
from workers.engine.bindings import gemm, native
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.options import EngineOptions

pytestmark = pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="they are for x86-64")

#: Those that are computed with AVX2, and with AVX-512.
TYPES = {gemm.AVX2: {"q4_1", "q5_0", "q5_1"}, gemm.AVX512: {"q4_1", "q5_0", "q5_1", "q8_0"}}
#: No multiple of the tokens that are computed at a time, nor of the rows of the panels.
TOKENS = [7 + 13 * number % 40_000 for number in range(201)]


@pytest.fixture(autouse=True)
def _use_afterwards() -> Iterator[None]:
    yield
    gemm.use()


@pytest.fixture(params=[gemm.AVX512, gemm.AVX2])
def bits(request: pytest.FixtureRequest) -> int:
    if gemm.use(request.param) != request.param:
        pytest.skip(f"this processor has no vectors of {request.param} bits with these instructions")
    return int(request.param)


@pytest.fixture(params=sorted(TYPES[gemm.AVX512]))
def type_(request: pytest.FixtureRequest, bits: int) -> str:
    if request.param not in TYPES[bits]:
        pytest.skip("it is left to ggml")
    return str(request.param)


class Case:
    """Random weights, shape (rows, columns), in a type, and activations of tokens."""

    def __init__(self, type_: str, rows: int, columns: int, tokens: int, threads: int = 1) -> None:
        random = np.random.default_rng(rows * columns)
        self._backend, self._type, self._rows = Backend(threads), type_, rows
        self._weights = self._backend.quantised(type_, random.standard_normal((rows, columns), np.float32))
        self.activations = random.standard_normal((64, columns), np.float32)[:tokens]

    def computed(self, bits: int, tokens: slice = slice(None)) -> Floats:
        product = Product(self._backend, self._type, self._weights, self._rows, self.activations[tokens].copy())
        product.compute(bits)
        found = product.results.copy()
        product.close()
        return found

    def exact(self) -> Floats:
        rows = self._weights.reshape(self._rows, -1)
        floats = dequantize(rows, GGMLQuantizationType[self._type.upper()])
        return np.asarray(self.activations.astype(np.float64) @ floats.astype(np.float64).T, np.float32)


def difference(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_they_are_compiled_in_and_used() -> None:
    assert gemm.use() in {gemm.AVX512, gemm.AVX2}


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(1, 32, 2), (16, 64, 9), (17, 576, 8), (100, 1536, 33), (520, 96, 3), (48, 8192, 5)]
)
def test_results_are_those_of_the_weights_and_of_the_kernels(
    type_: str, rows: int, columns: int, tokens: int, bits: int
) -> None:
    case = Case(type_, rows, columns, tokens)
    found, exact = case.computed(bits), case.exact()
    assert difference(found, exact) < 0.02, "activations are rounded to eight bits"
    assert difference(found, case.computed(0)) < 1e-5, "ggml's kernels round them alike"


def test_a_result_depends_on_its_row_and_token_only(type_: str, bits: int) -> None:
    whole = Case(type_, 530, 576, 29).computed(bits)
    for threads in (2, 3, 7):
        assert np.array_equal(Case(type_, 530, 576, 29, threads).computed(bits), whole)
    case = Case(type_, 530, 576, 29)
    assert not np.array_equal(case.computed(0), whole), "ggml's kernels add in another order"
    for first, last in ((0, 2), (3, 6), (4, 11), (5, 13), (5, 22)):
        assert np.array_equal(case.computed(bits, slice(first, last)), whole[first:last])
    if bits == gemm.AVX512:
        assert np.array_equal(case.computed(bits, slice(7, 8)), whole[7:8])
        assert type_ not in TYPES[gemm.AVX2] or np.array_equal(case.computed(gemm.AVX2), whole)


def test_activations_may_be_zeros_and_large(type_: str, bits: int) -> None:
    case = Case(type_, 40, 64, 6)
    case.activations[1] = 0
    case.activations[2] *= 1e4
    case.activations[3] *= 1e-3
    found, exact = case.computed(bits), case.exact()
    assert not found[1].any()
    for token in (0, 2, 3, 4, 5):
        assert difference(found[token], exact[token]) < 0.03


def test_other_types_and_one_token_with_avx2_are_left_to_ggml(bits: int) -> None:
    for case in (Case("q6_K", 64, 256, 9), Case("f16", 64, 64, 9)):
        assert np.array_equal(case.computed(bits), case.computed(0))
    one = Case("q4_1", 64, 576, 1)
    assert np.array_equal(one.computed(gemm.AVX2), one.computed(0))


@pytest.fixture(scope="module", params=["Q4_1", "Q5_1", "Q5_0", "Q8_0"])
def quantised(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers, whose weights have the type."""
    target = tmp_path_factory.mktemp("quantised") / f"{request.param}.gguf"
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{request.param}")
    params.nthread = 1
    assert api.llama_model_quantize(os.fsencode(tiny_llama), os.fsencode(target), params) == 0
    return target


def last_logits(path: Path, bits: int, threads: int = 1) -> Floats:
    """The logits after TOKENS."""
    options = EngineOptions(slots=1, context=512, threads=threads, threads_batch=threads, vectors=False)
    model = LlamaModel(path, options)
    context = Context(model, options)
    gemm.use(bits)
    assert context.decode([(0, 0, TOKENS, 1)]) == 0
    logits = context.logits(1)[0].copy()
    context.close()
    model.close()
    return logits


def test_the_logits_of_a_model_are_those_of_the_kernels(quantised: Path, model_path: Path, bits: int) -> None:
    for path in (quantised, model_path):
        expected, found = last_logits(path, 0), last_logits(path, bits)
        if bits == gemm.AVX512:  # AVX2 leaves Q8_0 to ggml
            assert not np.array_equal(expected, found), "the same kernels computed both"
        assert np.abs(expected - found).max() < 0.02 * np.abs(expected).max()


def test_the_logits_do_not_depend_on_the_number_of_threads(quantised: Path, model_path: Path) -> None:
    for path in (quantised, model_path):
        one = last_logits(path, gemm.AVX512)
        assert all(np.array_equal(one, last_logits(path, gemm.AVX512, threads)) for threads in (2, 3))


def test_a_library_without_them_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", api.llama_cpp)
    assert gemm.use() == 0
