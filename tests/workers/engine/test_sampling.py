"""Choices: those of llama.cpp's samplers, and those that numpy makes in their place."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import llama_cpp as api
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inference.requests import ChatMessage, GenerateRequest, Sampling
from workers.engine.best import Best
from workers.engine.constraint import Alphabet
from workers.engine.engine import LlamaEngine
from workers.engine.sampling import Candidates, Chooser


class Rows:
    """Hands rows of logits to a chooser without a context."""

    def __init__(self, engine: LlamaEngine) -> None:
        self.model, self.n = engine.model, engine.model.n_vocab
        self.candidates = Candidates(self.n)

    def chooser(self, sampling: Sampling, prompt: tuple[int, ...] = (), seed: int = 1) -> Chooser:
        return Chooser(self.model, sampling, seed, prompt, alphabet=Alphabet(self.model), context=4096)


@pytest.fixture(scope="module")
def rows(shared: LlamaEngine) -> Rows:
    return Rows(shared)


@settings(max_examples=30, deadline=None)
@given(
    history=st.lists(st.integers(0, 20), max_size=40),
    last=st.sampled_from([-1, 1, 8, 64]),
    repeat=st.sampled_from([1.0, 1.1, 1.9]),
    frequency=st.sampled_from([0.0, 0.7, -0.5]),
    presence=st.sampled_from([0.0, 1.5]),
)
def test_penalties_are_those_of_llama_cpp(
    rows: Rows, history: list[int], last: int, repeat: float, frequency: float, presence: float
) -> None:
    row = np.random.default_rng(len(history)).standard_normal(rows.n).astype(np.float32) * 4
    sampling = Sampling(
        temperature=0,
        repeat_penalty=repeat,
        frequency_penalty=frequency,
        presence_penalty=presence,
        penalty_last_n=last,
    )
    ours = row.copy()
    chooser = rows.chooser(sampling, tuple(history[: len(history) // 2]))
    for token in history[len(history) // 2 :]:
        chooser._remember(token)
    if chooser._penalised:
        chooser._punish(ours)
    window = len(history) if last < 0 else last
    theirs = api.llama_sampler_init_penalties(rows.n, window, repeat, frequency, presence)
    for token in history:
        api.llama_sampler_accept(theirs, token)
    rows.candidates.fill(row)
    rows.candidates.apply(theirs)
    found = np.empty_like(row)
    found[rows.candidates._ids] = rows.candidates._logits
    api.llama_sampler_free(theirs)
    np.testing.assert_allclose(ours, found, rtol=1e-5, atol=1e-5)


def test_a_nucleus_without_top_k_is_narrowed_without_changing_it(rows: Rows) -> None:
    row = np.random.default_rng(0).standard_normal(rows.n).astype(np.float32) * 6
    sampling = Sampling(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0)
    chooser = rows.chooser(sampling)
    assert chooser._narrow(row, rows.candidates)
    probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    order = np.argsort(-row)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(probabilities[order]), 0.9)) + 1].tolist())
    drawn = Counter(chooser.choose(row.copy(), rows.candidates) for _ in range(300))
    assert set(drawn) <= nucleus
    best = int(order[0])
    assert abs(drawn[best] / 300 - probabilities[best] / 0.9) < 0.1
    flat = np.zeros(rows.n, np.float32)
    assert not chooser._narrow(flat, rows.candidates)


def test_choosing_for_many_rows_at_once_draws_the_same_tokens(rows: Rows) -> None:
    logits = np.random.default_rng(1).standard_normal((6, rows.n)).astype(np.float32) * 4
    best = Best(logits, 40)
    for number in range(6):
        for seed in range(20):
            narrowed, whole = rows.chooser(Sampling(), seed=seed), rows.chooser(Sampling(), seed=seed)
            ours = narrowed.choose(logits[number], rows.candidates, near=best.of(number))
            assert ours == whole.choose(logits[number], rows.candidates)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_of_each_row_are_found_and_nothing_better_is_left_out(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 256))
    width = data.draw(st.integers(count, 6000))
    kind = data.draw(st.sampled_from(["spread", "sorted", "few values", "barred"]))
    logits = np.random.default_rng(width).standard_normal((data.draw(st.integers(1, 3)), width)).astype(np.float32)
    if kind == "sorted":
        logits.sort(axis=1)
    elif kind == "few values":
        logits = np.round(logits)
    elif kind == "barred":
        logits[:, count // 2 :] = -np.inf
    best = Best(logits, count)
    for number, row in enumerate(logits):
        ids = best.of(number)
        assert len(ids) >= count
        assert (np.diff(ids) > 0).all()
        assert np.delete(row, ids).max(initial=-np.inf) <= row[ids].min()
        assert kind == "barred" or np.delete(row, ids).max(initial=-np.inf) < np.partition(row, -count)[-count]


def test_rows_without_numbers_are_left_to_the_samplers(rows: Rows) -> None:
    logits = np.full((2, rows.n), np.nan, np.float32)
    assert not len(Best(logits, 40).of(0))


def test_a_bias_forbids_and_forces(shared: LlamaEngine) -> None:
    first = shared.generate(GenerateRequest(prompt="The", max_tokens=1, sampling=Sampling(temperature=0))).result(60)
    token = shared.model.tokens(first.text, opening=False, special=False)[0]
    barred = Sampling(temperature=0, logit_bias={token: -float("inf")})
    assert shared.generate(GenerateRequest(prompt="The", max_tokens=1, sampling=barred)).result(60).text != first.text
    forced = Sampling(temperature=0.7, logit_bias={token: 100.0})
    text = shared.generate(GenerateRequest(prompt="Zig", max_tokens=3, sampling=forced)).result(60).text
    assert text == first.text * 3


PAIR = {"type": "array", "items": {"enum": [1, 22]}, "maxItems": 2}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(mirostat=True),
        Sampling(temperature=0, dry_multiplier=0.8),
        Sampling(dry_multiplier=0.8, dry_breakers=()),
        Sampling(typical_p=0.9),
        Sampling(top_k=0, top_p=1.0, min_p=0.0),
        Sampling(top_k=0, top_p=0.9),
        Sampling(top_k=1),
        Sampling(repeat_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1, penalty_last_n=-1),
        Sampling(temperature=5.0, min_p=0.2),
    ],
)
def test_every_way_of_choosing_writes(shared: LlamaEngine, sampling: Sampling) -> None:
    requests: list[Any] = [
        GenerateRequest(messages=(ChatMessage("user", "Say something."),), max_tokens=8, sampling=sampling),
        GenerateRequest(prompt="a", max_tokens=30, sampling=sampling, schema=PAIR),
    ]
    assert all(ticket.result(60) for ticket in [shared.generate(request) for request in requests])


def test_dry_breaks_a_loop(shared: LlamaEngine) -> None:
    prompt = "a b c d e f g " * 8
    plain = Sampling(temperature=0, ignore_end=True)
    dry = Sampling(temperature=0, ignore_end=True, dry_multiplier=5.0, dry_breakers=())
    texts = [
        shared.generate(GenerateRequest(prompt=prompt, max_tokens=14, sampling=sampling)).result(60).text
        for sampling in (plain, dry)
    ]
    assert len(set(texts[1].split())) > len(set(texts[0].split()))


def test_the_layout_of_candidates_is_that_of_llama_cpp() -> None:
    from workers.engine.native import TOKEN_DATA

    assert ctypes.sizeof(api.llama_token_data) == TOKEN_DATA.itemsize
