"""Vectors: of length 1, the same in any company, and of long texts by the stated policy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.inference.requests import EmbedRequest, GenerateRequest, LongText, RerankRequest, Sampling
from app.kernel.errors import FailureReason, StepFailure
from workers.engine.embedding import windows
from workers.engine.engine import LlamaEngine

MakeEngine = Callable[..., LlamaEngine]

TEXTS = ("A dog runs over the field.", "Un perro corre por el campo.", "The bank raised its rates.", "x")


def vectors(engine: LlamaEngine, *texts: str, policy: LongText = LongText.CHUNK) -> np.ndarray:
    return np.array(engine.embed(EmbedRequest(texts, policy), timeout=60).vectors)


def test_vectors_have_length_one_and_do_not_depend_on_their_company(shared: LlamaEngine) -> None:
    together = vectors(shared, *TEXTS)
    alone = np.vstack([vectors(shared, text) for text in TEXTS])
    assert together.shape == (4, shared.model.n_embd)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.abs(together - alone).max() < 0.02


def test_many_texts_take_few_decodes_and_keep_their_order(make: MakeEngine) -> None:
    engine = make(slots=1)
    texts = [
        f"Text number {number} is about {'cats' if number % 2 else 'the weather in Lima'}." for number in range(60)
    ]
    found = vectors(engine, *texts)
    assert found.shape[0] == 60
    assert np.abs(found[37] - vectors(engine, texts[37])[0]).max() < 0.02
    assert engine.metrics().embedded_texts == 61


def test_long_texts_are_served_by_the_policy(make: MakeEngine) -> None:
    engine = make(slots=1, embedding_context=64)
    long = "The llama walks up the mountain. " * 40
    assert abs(np.linalg.norm(vectors(engine, long)[0]) - 1) < 1e-5
    beginning = vectors(engine, long, policy=LongText.TRUNCATE)[0]
    assert np.abs(beginning - vectors(engine, "The llama walks up the mountain. " * 9)[0]).max() < 0.2
    with pytest.raises(StepFailure) as caught:
        vectors(engine, "short", long, policy=LongText.REFUSE)
    assert caught.value.reason is FailureReason.CONTEXT_EXCEEDED


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(1, 64))
def test_windows_hold_each_token_once(lengths: list[int], size: int) -> None:
    texts = [list(range(length)) for length in lengths]
    found = windows(texts, size, LongText.CHUNK)
    for index, text in enumerate(texts):
        parts = [window.tokens for window in found if window.text == index]
        assert [token for part in parts for token in part] == text
        assert all(0 < len(part) <= size for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_texts_are_written_while_others_are_embedded(make: MakeEngine) -> None:
    engine = make(slots=2)
    sampling = Sampling(temperature=0, ignore_end=True)
    ticket = engine.generate(GenerateRequest(prompt="Once", max_tokens=30, sampling=sampling))
    assert len(vectors(engine, *TEXTS)) == 4
    assert ticket.result(60).tokens_out == 30


def test_an_empty_text_and_a_model_that_does_not_rank_are_refused(shared: LlamaEngine) -> None:
    with pytest.raises(StepFailure, match="empty"):
        vectors(shared, "a", "")
    with pytest.raises(StepFailure, match="no reranking model"):
        shared.rerank(RerankRequest("a", ("b",)))


def test_a_causal_model_can_be_made_to_rank_nothing(make: MakeEngine) -> None:
    """Where the file has no classifier, asking for one fails and harms nobody."""
    engine = make(slots=1)
    assert len(vectors(engine, "still alive")) == 1
