"""Sampling: the chain of llama.cpp's samplers, and the numpy code that replaces some of them."""

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
from workers.engine.engine import LlamaEngine
from workers.engine.sampling.constraint import FirstByteIndex
from workers.engine.sampling.sampler import TokenCandidates, TokenSampler
from workers.engine.sampling.top_tokens import TopTokens


class Samplers:
    """Creates token samplers without a context."""

    def __init__(self, engine: LlamaEngine) -> None:
        self.model, self.n = engine.model, engine.model.n_vocab
        self.candidates = TokenCandidates(self.n)

    def new(self, sampling: Sampling, prompt: tuple[int, ...] = (), seed: int = 1) -> TokenSampler:
        return TokenSampler(self.model, sampling, seed, prompt, byte_index=FirstByteIndex(self.model), context=4096)


@pytest.fixture(scope="module")
def samplers(shared: LlamaEngine) -> Samplers:
    return Samplers(shared)


@settings(max_examples=30, deadline=None)
@given(
    history=st.lists(st.integers(0, 20), max_size=40),
    last=st.sampled_from([-1, 1, 8, 64]),
    repeat=st.sampled_from([1.0, 1.1, 1.9]),
    frequency=st.sampled_from([0.0, 0.7, -0.5]),
    presence=st.sampled_from([0.0, 1.5]),
)
def test_penalties_equal_those_of_llama_cpp(
    samplers: Samplers, history: list[int], last: int, repeat: float, frequency: float, presence: float
) -> None:
    row = np.random.default_rng(len(history)).standard_normal(samplers.n).astype(np.float32) * 4
    sampling = Sampling(
        temperature=0,
        repeat_penalty=repeat,
        frequency_penalty=frequency,
        presence_penalty=presence,
        penalty_last_n=last,
    )
    actual = row.copy()
    sampler = samplers.new(sampling, tuple(history[: len(history) // 2]))
    for token in history[len(history) // 2 :]:
        sampler._count(token)
    if sampler._penalised:
        sampler._penalise(actual)
    window = len(history) if last < 0 else last
    reference = api.llama_sampler_init_penalties(samplers.n, window, repeat, frequency, presence)
    for token in history:
        api.llama_sampler_accept(reference, token)
    samplers.candidates.fill(row)
    samplers.candidates.apply(reference)
    found = np.empty_like(row)
    found[samplers.candidates._ids] = samplers.candidates._logits
    api.llama_sampler_free(reference)
    np.testing.assert_allclose(actual, found, rtol=1e-5, atol=1e-5)


def test_top_p_without_top_k_is_prefiltered_without_changing_the_choice(samplers: Samplers) -> None:
    row = np.random.default_rng(0).standard_normal(samplers.n).astype(np.float32) * 6
    sampling = Sampling(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0)
    sampler = samplers.new(sampling)
    assert sampler._prefilter(row, samplers.candidates)
    probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    order = np.argsort(-row)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(probabilities[order]), 0.9)) + 1].tolist())
    drawn = Counter(sampler.choose(row.copy(), samplers.candidates) for _ in range(300))
    assert set(drawn) <= nucleus
    best = int(order[0])
    assert abs(drawn[best] / 300 - probabilities[best] / 0.9) < 0.1
    flat = np.zeros(samplers.n, np.float32)
    assert not sampler._prefilter(flat, samplers.candidates)


def test_top_tokens_of_many_rows_lead_to_the_same_choices(samplers: Samplers) -> None:
    logits = np.random.default_rng(1).standard_normal((6, samplers.n)).astype(np.float32) * 4
    best = TopTokens(logits, 40)
    for number in range(6):
        for seed in range(20):
            prefiltered, whole = samplers.new(Sampling(), seed=seed), samplers.new(Sampling(), seed=seed)
            actual = prefiltered.choose(logits[number], samplers.candidates, top=best.of_row(number))
            assert actual == whole.choose(logits[number], samplers.candidates)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_top_tokens_contain_the_best_of_each_row(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 256))
    width = data.draw(st.integers(count, 6000))
    kind = data.draw(st.sampled_from(["spread", "sorted", "few values", "masked"]))
    logits = np.random.default_rng(width).standard_normal((data.draw(st.integers(1, 3)), width)).astype(np.float32)
    if kind == "sorted":
        logits.sort(axis=1)
    elif kind == "few values":
        logits = np.round(logits)
    elif kind == "masked":
        logits[:, count // 2 :] = -np.inf
    best = TopTokens(logits, count)
    for number, row in enumerate(logits):
        ids = best.of_row(number)
        assert len(ids) >= count
        assert (np.diff(ids) > 0).all()
        assert np.delete(row, ids).max(initial=-np.inf) <= row[ids].min()
        assert kind == "masked" or np.delete(row, ids).max(initial=-np.inf) < np.partition(row, -count)[-count]


def test_rows_of_nan_have_no_top_tokens(samplers: Samplers) -> None:
    logits = np.full((2, samplers.n), np.nan, np.float32)
    assert not len(TopTokens(logits, 40).of_row(0))


def test_a_bias_forbids_and_forces(shared: LlamaEngine) -> None:
    first = shared.generate(GenerateRequest(prompt="The", max_tokens=1, sampling=Sampling(temperature=0))).result(60)
    token = shared.model.tokenize(first.text, add_special=False, parse_special=False)[0]
    forbidden = Sampling(temperature=0, logit_bias={token: -float("inf")})
    assert (
        shared.generate(GenerateRequest(prompt="The", max_tokens=1, sampling=forbidden)).result(60).text != first.text
    )
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
def test_every_sampling_method_generates(shared: LlamaEngine, sampling: Sampling) -> None:
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


def test_the_layout_of_candidates_equals_that_of_llama_cpp() -> None:
    from workers.engine.bindings.native import TOKEN_DATA

    assert ctypes.sizeof(api.llama_token_data) == TOKEN_DATA.itemsize
