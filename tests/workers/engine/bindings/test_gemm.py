"""Products of quantised weights, also those of experts: beside exact ones, and the logits of models."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import llama_cpp as api
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from benchmarks import products
from benchmarks.ggml import Backend, Floats
from benchmarks.products import Product
from workers.engine.bindings import gemm, native
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.options import EngineOptions

pytestmark = pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="they are for x86-64")

#: Those that are computed with AVX2, and with AVX-512.
TYPES = {gemm.AVX2: set(products.TYPES) - {"q8_0", "iq4_nl", "iq4_xs"}, gemm.AVX512: set(products.TYPES)}
#: In blocks of 256 columns; the others have blocks of 32.
LARGE = {"q4_K", "q5_K", "q6_K", "iq4_xs"}
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
        columns = -(-columns // 256) * 256 if type_ in LARGE else columns
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
        return np.asarray(self.activations.astype(np.float64) @ exact_weights(rows, self._type).T, np.float32)


def exact_weights(rows: npt.NDArray[np.uint8], type_: str) -> npt.NDArray[np.float64]:
    return dequantize(rows, GGMLQuantizationType[type_.upper()]).astype(np.float64)


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
        assert type_ == "q6_K" or np.array_equal(case.computed(bits, slice(7, 8)), whole[7:8])
        assert type_ not in TYPES[gemm.AVX2] or np.array_equal(case.computed(gemm.AVX2), whole)


def test_activations_may_be_zeros_and_large(type_: str, bits: int) -> None:
    case = Case(type_, 40, 64, 6)
    case.activations[1] = 0
    case.activations[2] *= 1e4
    case.activations[3] *= 1e-3
    found, exact = case.computed(bits), case.exact()
    assert not found[1].any()
    case.activations[1, :9] = [0, 5, -5, 5, 4, -4, 3, 2, 1]  # the greatest has both signs
    found, exact = case.computed(bits), case.exact()
    assert difference(found, case.computed(0)) < 1e-5
    for token in range(6):
        assert difference(found[token], exact[token]) < 0.03


@pytest.mark.parametrize(
    ("experts", "used", "tokens", "each"), [(1, 1, 5, 1), (4, 2, 1, 1), (4, 2, 3, 1), (8, 3, 40, 1), (8, 3, 17, 3)]
)
def test_each_token_has_its_experts(type_: str, bits: int, experts: int, used: int, tokens: int, each: int) -> None:
    """The activations of a token are the same for all its experts, or each has its own."""
    rows, columns, backend, random = 37, 512, Backend(2), np.random.default_rng(experts * tokens)
    weights = backend.quantised(type_, random.standard_normal((experts * rows, columns), np.float32))
    activations = random.standard_normal((tokens, each, columns), np.float32)
    chosen = np.argsort(random.random((tokens, experts)))[:, :used].astype(np.int32)
    product = Product(backend, type_, weights, rows, activations, chosen)
    found = {}
    for tried in (0, bits):
        product.compute(tried)
        found[tried] = product.results.copy()
    product.close()
    matrices = exact_weights(weights.reshape(experts, rows, -1), type_)
    spread = np.broadcast_to(activations, (tokens, used, columns)).astype(np.float64)
    exact = np.einsum("tuc,turc->tur", spread, matrices[chosen])
    assert difference(found[bits], np.asarray(exact, np.float32)) < 0.02
    assert difference(found[bits], found[0]) < 1e-5
    left = (bits == gemm.AVX2 and tokens * used < 4 * experts) or (type_ == "q6_K" and tokens == 1)
    assert left == np.array_equal(found[bits], found[0])


def test_other_types_and_some_single_tokens_are_left_to_ggml(bits: int) -> None:
    for case in (Case("q3_K", 64, 256, 9), Case("f16", 64, 64, 9), Case("q6_K", 64, 256, 1)):
        assert np.array_equal(case.computed(bits), case.computed(0))
    one = Case("q4_1", 64, 576, 1)
    assert np.array_equal(one.computed(gemm.AVX2), one.computed(0))


@pytest.fixture(
    scope="module",
    params=["model_path", "tiny_llama Q4_0", "tiny_llama Q8_0", "tiny_experts Q4_K_M", "tiny_experts IQ4_XS"],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    """SmolLM2 in Q4_1, and tiny models in other types."""
    name, _, type_ = request.param.partition(" ")
    path: Path = request.getfixturevalue(name)
    if type_:
        source, path = path, tmp_path_factory.mktemp("quantised") / f"{type_}.gguf"
        params = api.llama_model_quantize_default_params()
        params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{type_}")
        params.nthread = 1
        assert api.llama_model_quantize(os.fsencode(source), os.fsencode(path), params) == 0
    loaded = LlamaModel(path, EngineOptions(slots=1, context=512, vectors=False))
    yield loaded
    loaded.close()


def last_logits(model: LlamaModel, bits: int, threads: int = 1) -> Floats:
    """The logits after TOKENS."""
    options = model.options.model_copy(update={"threads": threads, "threads_batch": threads})
    context = Context(model, options)
    gemm.use(bits)
    assert context.decode([(0, 0, TOKENS, 1)]) == 0
    logits = context.logits(1)[0].copy()
    context.close()
    return logits


def test_the_logits_of_a_model_are_those_of_the_kernels(model: LlamaModel, bits: int) -> None:
    expected, found = last_logits(model, 0), last_logits(model, bits)
    if bits == gemm.AVX512:  # AVX2 leaves some types to ggml
        assert not np.array_equal(expected, found), "the same kernels computed both"
    assert np.abs(expected - found).max() < 0.02 * np.abs(expected).max()


def test_the_logits_do_not_depend_on_the_number_of_threads(model: LlamaModel) -> None:
    one = last_logits(model, gemm.AVX512)
    assert all(np.array_equal(one, last_logits(model, gemm.AVX512, threads)) for threads in (2, 3))


def test_weights_stay_as_the_file_has_them(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gemm.replace_repacking()
    monkeypatch.setattr(gemm, "replace_repacking", lambda: False)
    repacked = LlamaModel(model.path, model.options)
    expected, found = last_logits(repacked, 0), last_logits(model, gemm.AVX512)
    repacked.close()
    assert np.abs(expected - found).max() < 0.02 * np.abs(expected).max()


def test_a_library_without_them_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", api.llama_cpp)
    assert gemm.use() == 0
    assert not gemm.replace_repacking(), "then ggml repacks weights"
