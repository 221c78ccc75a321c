"""Embedding and reranking: vectors of length 1 that do not depend on the batch, and the policies for long texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import PoolingType
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inference.requests import EmbedRequest, GenerateRequest, LongText, RerankRequest, Sampling
from app.kernel.errors import FailureReason, ModelUnsupported, StepFailure
from workers.engine.embedding import TextEnds, split_into_windows
from workers.engine.engine import LlamaEngine
from workers.pool import measurement

MakeEngine = Callable[..., LlamaEngine]

TEXTS = ("A dog runs over the field.", "Un perro corre por el campo.", "The bank raised its rates.", "x")


def vectors(engine: LlamaEngine, *texts: str, policy: LongText = LongText.CHUNK) -> np.ndarray:
    return np.array(engine.embed(EmbedRequest(texts, policy), timeout=60).vectors)


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(shared: LlamaEngine) -> None:
    together = vectors(shared, *TEXTS)
    alone = np.vstack([vectors(shared, text) for text in TEXTS])
    assert together.shape == (4, shared.model.n_embd)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.abs(together - alone).max() < 0.02


def test_many_texts_share_decodes_and_keep_their_order(make: MakeEngine) -> None:
    engine = make(slots=1)
    texts = [
        f"Text number {number} is about {'cats' if number % 2 else 'the weather in Lima'}." for number in range(30)
    ]
    found = vectors(engine, *texts)
    assert found.shape[0] == 30
    assert np.abs(found[17] - vectors(engine, texts[17])[0]).max() < 0.02
    assert engine.metrics().embedded_texts == 31


def test_the_policy_decides_about_long_texts(make: MakeEngine) -> None:
    engine = make(slots=1, embedding_context=64)
    long = "The llama walks up the mountain. " * 40
    assert abs(np.linalg.norm(vectors(engine, long)[0]) - 1) < 1e-5
    beginning = vectors(engine, long, policy=LongText.TRUNCATE)[0]
    assert np.abs(beginning - vectors(engine, "The llama walks up the mountain. " * 9)[0]).max() < 0.2
    with pytest.raises(StepFailure) as caught:
        vectors(engine, "short", long, policy=LongText.REFUSE)
    assert caught.value.reason is FailureReason.CONTEXT_EXCEEDED


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(1, 64))
def test_each_token_is_in_exactly_one_window(lengths: list[int], size: int) -> None:
    texts = [list(range(length)) for length in lengths]
    found = split_into_windows(texts, size, LongText.CHUNK)
    for index, text in enumerate(texts):
        parts = [window.tokens for window in found if window.text == index]
        assert [token for part in parts for token in part] == text
        assert all(0 < len(part) <= size for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


ENDS = TextEnds((101,), (102, 103))


@settings(deadline=None)
@given(st.lists(st.integers(3, 150), max_size=4), st.integers(4, 64))
def test_each_window_of_a_long_text_begins_and_ends_as_a_text_does(lengths: list[int], size: int) -> None:
    texts = [[101, *range(1000, 997 + length), 102, 103] for length in lengths]
    for policy in (LongText.CHUNK, LongText.TRUNCATE):
        found = split_into_windows(texts, size, policy, ENDS)
        for index, text in enumerate(texts):
            parts = [window.tokens for window in found if window.text == index]
            assert all(len(part) <= size and part[0] == 101 and part[-2:] == (102, 103) for part in parts)
            inner = [token for part in parts for token in part[1:-2]]
            assert inner == (text[1:-2] if policy is LongText.CHUNK else text[1:-2][: size - 3])


def test_generation_continues_while_texts_are_embedded(make: MakeEngine) -> None:
    engine = make(slots=2)
    sampling = Sampling(temperature=0, ignore_end=True)
    ticket = engine.generate(GenerateRequest(prompt="Once", max_tokens=30, sampling=sampling))
    assert len(vectors(engine, *TEXTS)) == 4
    assert ticket.result(60).tokens_out == 30


def test_an_empty_text_and_a_model_that_is_not_a_reranker_are_rejected(shared: LlamaEngine) -> None:
    with pytest.raises(StepFailure, match="empty"):
        vectors(shared, "a", "")
    with pytest.raises(StepFailure, match="not a reranking model"):
        shared.rerank(RerankRequest("a", ("b",)))


def plain_vectors(path: Path, inputs: list[list[int]], width: int) -> np.ndarray:
    """Return what llama-cpp-python computes for these tokens, one text at a time, with the pooling of the file."""
    llama = llama_cpp.Llama(str(path), embedding=True, n_threads=1, n_threads_batch=1, n_ubatch=512, verbose=False)
    try:
        found = []
        for tokens in inputs:
            llama._batch.reset()
            llama._batch.add_sequence(tokens, 0, True)
            llama._ctx.kv_cache_clear()
            llama._ctx.decode(llama._batch)
            found.append(llama_cpp.llama_get_embeddings_seq(llama._ctx.ctx, 0)[:width])
        return np.array(found)
    finally:
        llama.close()


def normalised(found: np.ndarray) -> np.ndarray:
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("pooling", [PoolingType.MEAN, PoolingType.CLS, PoolingType.LAST])
def test_an_embedding_model_uses_the_pooling_of_its_file(
    make: MakeEngine, tiny_bert: Callable[..., Path], pooling: PoolingType
) -> None:
    path = tiny_bert(pooling)
    engine = make(path, slots=2, flash_attention=False)
    texts = ("the llama in the mountain", "a bank", "wool.")
    tokens = [engine.model.tokenize(text, add_special=True, parse_special=False) for text in texts]
    found = vectors(engine, *texts)
    np.testing.assert_allclose(found, normalised(plain_vectors(path, tokens, engine.model.n_embd)), atol=2e-5)
    configured = make(tiny_bert(PoolingType.MEAN), flash_attention=False, pooling=pooling.name.lower())
    np.testing.assert_allclose(vectors(configured, *texts), found, atol=2e-5)


def test_an_embedding_model_cannot_generate(make: MakeEngine, tiny_bert: Callable[..., Path]) -> None:
    engine = make(tiny_bert(PoolingType.MEAN))
    with pytest.raises(StepFailure, match="cannot generate text") as caught:
        engine.generate(GenerateRequest(prompt="the llama"))
    assert caught.value.reason is FailureReason.INVALID_REQUEST


def scores(engine: LlamaEngine, query: str, *documents: str) -> list[float]:
    return list(engine.rerank(RerankRequest(query, documents), timeout=60).scores)


@pytest.mark.parametrize(
    ("flags", "between", "after"),
    [
        ({}, [3], [3]),  # older files name only the separator
        ({"add_eos_token_id": 3, "add_add_eos_token": True, "add_add_sep_token": False}, [3], [3]),
        ({"add_eos_token_id": 4, "add_add_eos_token": True, "add_add_sep_token": True}, [4, 3], [4]),
    ],
    ids=["separator only", "current converter", "RoBERTa"],
)
def test_scores_of_pairs_equal_those_of_llama(
    make: MakeEngine, tiny_bert: Callable[..., Path], flags: dict[str, bool | int], between: list[int], after: list[int]
) -> None:
    path = tiny_bert(PoolingType.RANK, **flags)
    engine = make(path, slots=2, flash_attention=False)
    query, documents = "the llama", ["in the mountain", "the bank rate [SEP]", "wool."]

    def tokens(text: str) -> list[int]:
        return engine.model.tokenize(text, add_special=False, parse_special=False)

    pairs = [[2, *tokens(query), *between, *tokens(document), *after] for document in documents]
    plain = plain_vectors(path, pairs, 1)[:, 0]
    found = scores(engine, query, *documents)
    np.testing.assert_allclose(found, plain, atol=1e-3)
    assert np.abs(np.diff(sorted(found))).min() > 0.1
    with pytest.raises(StepFailure, match="cannot embed texts"):
        vectors(engine, "wool.")


def test_a_reranker_with_its_own_prompt_gets_it(make: MakeEngine, tiny_reranker: Path) -> None:
    engine = make(tiny_reranker, slots=1, flash_attention=False)
    source, query = engine.model.chat_template("rerank"), "wool"
    assert source is not None
    documents = ["A llama has wool.", "The {query} of a bank"]
    prompts = [source.replace("{query}", query).replace("{document}", document) for document in documents]
    tokens = [engine.model.tokenize(prompt, add_special=False, parse_special=True) for prompt in prompts]
    found = scores(engine, query, *documents)
    np.testing.assert_allclose(found, plain_vectors(tiny_reranker, tokens, 1)[:, 0], atol=2e-4)
    assert all(0 < score < 1 for score in found)
    ended = engine._template.rerank_prompt(query, "It ends.<|im_end|>")
    assert ended.count(engine.model.tokenize("<|im_end|>", add_special=False, parse_special=True)[0]) == source.count(
        "<|im_end|>"
    )


def test_a_warm_up_uses_every_capability_of_the_model(make: MakeEngine, tiny_bert: Callable[..., Path]) -> None:
    for path in (tiny_bert(PoolingType.RANK), tiny_bert(PoolingType.CLS)):
        engine = make(path, slots=1)
        measurement._warm_up(engine, whole=False)
        assert engine.metrics().embedded_texts == 1
    both = make(slots=1, embedding_context=64)
    measurement._warm_up(both, whole=False)
    assert (both.metrics().embedded_texts, both.metrics().finished) == (1, 1)


def test_vectors_without_reserved_memory_are_rejected(make: MakeEngine) -> None:
    engine = make(slots=1, vectors=False)
    measurement._warm_up(engine, whole=False)
    with pytest.raises(StepFailure, match="needs the use case embed") as caught:
        vectors(engine, "wool.")
    assert caught.value.reason is FailureReason.INVALID_REQUEST


def test_a_model_without_a_classifier_is_rejected_as_a_reranker(make: MakeEngine) -> None:
    with pytest.raises(ModelUnsupported, match="no classifier"):
        make(slots=1, pooling="rank")
