"""Attention to the cells of a KV cache: beside exact results, ggml's kernels and the logits of a model."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks import attention
from benchmarks.attention import Attention, Halves, Seen, Shape, masked
from benchmarks.ggml import Backend, Floats
from workers.engine.bindings import gemm
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.options import EngineOptions, KvLayout

pytestmark = pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="it is for x86-64")

SMOL = Shape(9, 3, 64, 64)


@pytest.fixture(autouse=True)
def _use_afterwards() -> Iterator[None]:
    if gemm.use() != gemm.AVX512:
        pytest.skip("this processor has no AVX-512 with these instructions")
    yield
    gemm.use()


class Case:
    """Random queries, keys and values, with a mask, shape (streams, tokens, cells), or none."""

    def __init__(self, shape: Shape, streams: int, tokens: int, cells: int, mask: Halves | None) -> None:
        self.queries, self.keys, self.values = attention.random_cells(shape, streams, tokens, cells)
        self.mask = mask
        self.sinks: Floats | None = None

    @classmethod
    def of(cls, shape: Shape, seen: Seen) -> Case:
        return cls(shape, *seen.shape, masked(seen))

    def computed(self, bits: int = gemm.AVX512, threads: int = 1, *, by_heads: bool = False) -> Floats:
        given = (self.queries, self.keys, self.values, self.mask, self.sinks)
        one = Attention(Backend(threads), *given, by_heads=by_heads)
        one.compute(bits)
        found = one.results.copy()
        one.close()
        return found

    def exact(self) -> Floats:
        group = self.queries.shape[2] // self.keys.shape[2]
        keys = np.repeat(self.keys.astype(np.float64), group, 2)
        values = np.repeat(self.values.astype(np.float64), group, 2)
        scores = np.einsum("sthc,snhc->shtn", self.queries.astype(np.float64), keys) / self.queries.shape[-1] ** 0.5
        if self.mask is not None:
            scores = scores + self.mask.astype(np.float64)[:, None]
        if self.sinks is not None:  # a cell without a value
            sinks = np.broadcast_to(self.sinks[:, None, None].astype(np.float64), (*scores.shape[:3], 1))
            scores = np.concatenate([scores, sinks], 3)
        greatest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(greatest), greatest, 0))
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        return np.asarray(np.einsum("shtn,snhc->sthc", weights[..., : values.shape[1]], values), np.float32)


def difference(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def scattered(tokens: int, cells: int) -> Seen:
    """Each token sees a part of the cells: many see the first, and few the last."""
    random = np.random.default_rng(cells)
    return random.random((1, tokens, cells)) < np.linspace(1.2, 0, cells)


SEEN: dict[str, Seen] = {
    "a text": attention.streams(1, 300),
    "a text of few cells": attention.streams(1, 3),
    "buffers": attention.streams(5, 700),
    "one cell": attention.streams(2, 1),
    "texts in one buffer": attention.unified(7, 90),
    "a shared prefix": attention.shared(6, 500),
    "more texts than are computed together": attention.shared(37, 70),
    "a prompt": attention.prompt(20, 0),
    "a prompt after others": attention.prompt(41, 333),
    "many tokens": attention.prompt(130, 600),
    "scattered cells": scattered(16, 517),
    "scattered cells of a few": scattered(3, 40),
    "a window": attention.prompt(70, 90) & ~np.tri(70, 160, 40, dtype=bool)[None],
}


@pytest.mark.parametrize("name", SEEN)
def test_results_are_exact(name: str) -> None:
    case = Case.of(SMOL, SEEN[name])
    found, ggml = case.computed(), case.computed(0)
    assert difference(found, case.exact()) < 2e-6
    assert difference(found, ggml) < 0.01, "ggml adds up values in halves"
    assert name == "one cell" or not np.array_equal(found, ggml), "the same kernels computed both"


@pytest.mark.parametrize(
    "shape",
    [
        *(Shape(queries, 2, 64, 64) for queries in (2, 4, 6, 8, 10, 14, 18, 24)),
        Shape(71, 1, 64, 64),
        Shape(130, 2, 16, 16),
        *(Shape(4, 2, columns, columns) for columns in (16, 48, 80, 96, 128, 256)),
        Shape(4, 2, 192, 128),
        Shape(4, 1, 576, 512),
        Shape(8, 1, 32, 64),
    ],
    ids=str,
)
def test_heads_have_any_number_and_size(shape: Shape) -> None:
    for seen in (attention.streams(2, 290), attention.unified(3, 60), attention.prompt(19, 100)):
        case = Case.of(shape, seen)
        assert difference(case.computed(), case.exact()) < 2e-6


def test_without_a_mask_all_cells_are_seen() -> None:
    for tokens, cells in ((1, 270), (12, 100), (50, 33)):
        case = Case(SMOL, 2, tokens, cells, None)
        assert difference(case.computed(), case.exact()) < 2e-6


def test_masks_may_have_other_values() -> None:
    random, mask = np.random.default_rng(1), masked(scattered(9, 300))
    mask += random.standard_normal(mask.shape).astype(np.float16)
    for tokens in (1, 9):
        case = Case(SMOL, 1, tokens, 300, mask[:, :tokens].copy())
        assert difference(case.computed(), case.exact()) < 2e-6


def test_streams_may_have_the_same_mask() -> None:
    mask = masked(scattered(4, 100))
    case = Case(SMOL, 3, 4, 100, mask)
    assert difference(case.computed(), case.exact()) < 2e-6


@pytest.mark.parametrize("seen", [attention.streams(2, 600), attention.prompt(70, 30)], ids=["in parts", "whole"])
def test_a_sink_takes_a_part_of_the_weights(seen: Seen) -> None:
    case = Case.of(SMOL, seen)
    case.sinks = np.linspace(-3, 9, SMOL.queries, dtype=np.float32)
    assert difference(case.computed(), case.exact()) < 2e-6


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    for seen in (attention.streams(1, 1000), attention.unified(9, 200), attention.prompt(200, 300)):
        case = Case.of(SMOL, seen)
        one = case.computed()
        assert all(np.array_equal(case.computed(threads=threads), one) for threads in (2, 3, 7))


@pytest.mark.parametrize("name", SEEN)
def test_a_result_does_not_depend_on_the_other_tokens(name: str) -> None:
    whole = Case.of(SMOL, SEEN[name])
    found = whole.computed()
    for token in range(0, whole.queries.shape[1], 5):
        for count in (1, 3):
            some = Case.of(SMOL, SEEN[name])
            some.queries = some.queries[:, token : token + count].copy()
            some.mask = masked(SEEN[name][:, token : token + count].copy())
            assert np.array_equal(some.computed(threads=2), found[:, token : token + count])


def test_a_result_does_not_depend_on_the_cells_of_others() -> None:
    """The same cells in another buffer, among many that the tokens do not see."""
    near = Case.of(SMOL, attention.shared(6, 300))
    cells = near.keys.shape[1]
    places = np.sort(np.random.default_rng(1).permutation(4 * cells)[:cells])
    seen = np.zeros((1, 6, 4 * cells), bool)
    seen[:, :, places] = attention.shared(6, 300)
    far = Case.of(SMOL, seen)
    far.queries = near.queries
    far.keys[:, places], far.values[:, places] = near.keys, near.values
    assert np.array_equal(far.computed(), near.computed())


def test_a_token_that_sees_no_cell_has_zeros() -> None:
    seen = scattered(6, 200)
    seen[0, 2] = False
    case = Case.of(SMOL, seen)
    assert not case.computed()[0, 2].any()
    assert difference(case.computed(), case.exact()) < 2e-6


def test_scores_may_be_large() -> None:
    case = Case.of(SMOL, attention.prompt(20, 200))
    case.queries *= 300
    assert difference(case.computed(), case.exact()) < 1e-4
    case.queries[0, :, 4] = 0
    exact, found = case.exact(), case.computed()
    assert difference(found[0, :, 4], exact[0, :, 4]) < 2e-6


def test_what_is_not_a_number_stays_with_the_texts_that_see_it() -> None:
    case = Case.of(SMOL, attention.unified(8, 50))
    cell = int(np.flatnonzero(attention.unified(8, 50)[0, 3])[5])
    before = case.computed()
    case.keys[0, cell], case.values[0, cell] = np.nan, np.inf
    found = case.computed()
    others = np.arange(8) != 3
    assert np.array_equal(found[0, others], before[0, others])
    assert np.isnan(found[0, 3]).all()


def test_keys_may_lie_by_heads() -> None:
    for seen in (attention.streams(3, 700), attention.prompt(20, 50)):
        case = Case.of(SMOL, seen)
        assert np.array_equal(case.computed(threads=2, by_heads=True), case.computed())


@pytest.mark.parametrize("shape", [Shape(4, 2, 40, 40), Shape(4, 2, 64, 72)], ids=str)
def test_other_sizes_are_left_to_ggml(shape: Shape) -> None:
    case = Case.of(shape, attention.prompt(5, 100))
    assert np.array_equal(case.computed(), case.computed(0))


TOKENS = [7 + 13 * number % 40_000 for number in range(400)]


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[LlamaModel]:
    loaded = LlamaModel(model_path, EngineOptions(slots=4, context=4096, layout=KvLayout.UNIFIED, vectors=False))
    yield loaded
    loaded.close()


def logits_of(model: LlamaModel, threads: int = 1, **options: object) -> npt.NDArray[np.float32]:
    """The logits of four texts that have 300 tokens in common, after thirty of their own."""
    chosen = model.options.model_copy(update={"threads": threads, "threads_batch": threads, **options})
    context = Context(model, chosen)
    assert context.decode([(0, 0, TOKENS[:300], 1)]) == 0
    for text in (1, 2, 3):
        assert context.copy(0, text, 300)
    for text in range(4):
        assert context.decode([(text, 300, TOKENS[300 + text : 330 + text], 1)]) == 0
    assert context.decode([(text, 330, [TOKENS[text]], 1) for text in range(4)]) == 0
    found = context.logits(4).copy()
    context.close()
    return found


def test_the_logits_of_a_model_are_those_without_flash_attention(model: LlamaModel) -> None:
    found, exact = logits_of(model), logits_of(model, flash_attention=False)
    gemm.use(0)
    ggml = logits_of(model)
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert not np.array_equal(found, ggml)


def test_the_logits_do_not_depend_on_the_number_of_threads(model: LlamaModel) -> None:
    assert np.array_equal(logits_of(model), logits_of(model, threads=2))
