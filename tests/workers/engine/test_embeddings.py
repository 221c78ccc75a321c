"""Vectors: of length 1, the same in any company, and of long texts by the stated policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import PoolingType
from hypothesis import given
from hypothesis import strategies as st

from app.inference.requests import EmbedRequest, GenerateRequest, LongText, RerankRequest, Sampling
from app.kernel.errors import FailureReason, ModelUnsupported, StepFailure
from workers.engine.embedding import windows
from workers.engine.engine import LlamaEngine
from workers.pool import measurement

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


def plain_vectors(path: Path, inputs: list[list[int]], width: int) -> np.ndarray:
    """What llama-cpp-python computes for these tokens, one text at a time, pooled as the file says."""
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


def of_length_one(found: np.ndarray) -> np.ndarray:
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("pooling", [PoolingType.MEAN, PoolingType.CLS, PoolingType.LAST])
def test_a_model_made_for_embedding_pools_as_its_file_says(
    make: MakeEngine, tiny_bert: Callable[..., Path], pooling: PoolingType
) -> None:
    path = tiny_bert(pooling)
    engine = make(path, slots=2, flash_attention=False)
    texts = ("the llama in the mountain", "a bank", "wool.")
    tokens = [engine.model.tokens(text, opening=True, special=False) for text in texts]
    found = vectors(engine, *texts)
    np.testing.assert_allclose(found, of_length_one(plain_vectors(path, tokens, engine.model.n_embd)), atol=2e-5)
    told = make(tiny_bert(PoolingType.MEAN), flash_attention=False, pooling=pooling.name.lower())
    np.testing.assert_allclose(vectors(told, *texts), found, atol=2e-5)


def test_a_model_that_only_embeds_writes_nothing(make: MakeEngine, tiny_bert: Callable[..., Path]) -> None:
    engine = make(tiny_bert(PoolingType.MEAN))
    with pytest.raises(StepFailure, match="writes no texts") as caught:
        engine.generate(GenerateRequest(prompt="the llama"))
    assert caught.value.reason is FailureReason.INVALID_REQUEST


def scores(engine: LlamaEngine, query: str, *documents: str) -> list[float]:
    return list(engine.rerank(RerankRequest(query, documents), timeout=60).scores)


@pytest.mark.parametrize(
    ("flags", "between", "after"),
    [
        ({}, [3], [3]),  # as older files are: only the token that parts texts is named
        ({"add_eos_token_id": 3, "add_add_eos_token": True, "add_add_sep_token": False}, [3], [3]),
        ({"add_eos_token_id": 4, "add_add_eos_token": True, "add_add_sep_token": True}, [4, 3], [4]),
    ],
    ids=["sep alone", "as converted today", "as RoBERTa"],
)
def test_pairs_are_scored_as_llama_scores_them(
    make: MakeEngine, tiny_bert: Callable[..., Path], flags: dict[str, bool | int], between: list[int], after: list[int]
) -> None:
    path = tiny_bert(PoolingType.RANK, **flags)
    engine = make(path, slots=2, flash_attention=False)
    query, documents = "the llama", ["in the mountain", "the bank rate [SEP]", "wool."]

    def tokens(text: str) -> list[int]:
        return engine.model.tokens(text, opening=False, special=False)

    pairs = [[2, *tokens(query), *between, *tokens(document), *after] for document in documents]
    plain = plain_vectors(path, pairs, 1)[:, 0]
    found = scores(engine, query, *documents)
    np.testing.assert_allclose(found, plain, atol=1e-3)
    assert np.abs(np.diff(sorted(found))).min() > 0.1
    with pytest.raises(StepFailure, match="embeds no texts"):
        vectors(engine, "wool.")


def test_a_model_with_a_prompt_for_pairs_is_asked_with_it(make: MakeEngine, tiny_judge: Path) -> None:
    engine = make(tiny_judge, slots=1, flash_attention=False)
    source, query = engine.model.chat_template("rerank"), "wool"
    assert source is not None
    documents = ["A llama has wool.", "The {query} of a bank"]
    prompts = [source.replace("{query}", query).replace("{document}", document) for document in documents]
    tokens = [engine.model.tokens(prompt, opening=False, special=True) for prompt in prompts]
    found = scores(engine, query, *documents)
    np.testing.assert_allclose(found, plain_vectors(tiny_judge, tokens, 1)[:, 0], atol=2e-4)
    assert all(0 < score < 1 for score in found)
    ended = engine._template.pair(query, "It ends.<|im_end|>")
    assert ended.count(engine.model.tokens("<|im_end|>", opening=False, special=True)[0]) == source.count("<|im_end|>")


def test_a_pool_begins_with_all_that_its_model_is_for(make: MakeEngine, tiny_bert: Callable[..., Path]) -> None:
    for path in (tiny_bert(PoolingType.RANK), tiny_bert(PoolingType.CLS)):
        engine = make(path, slots=1)
        measurement._warm_up(engine, whole=False)
        assert engine.metrics().embedded_texts == 1
    both = make(slots=1, embedding_context=64)
    measurement._warm_up(both, whole=False)
    assert (both.metrics().embedded_texts, both.metrics().finished) == (1, 1)


def test_vectors_that_nobody_reserved_memory_for_are_refused(make: MakeEngine) -> None:
    engine = make(slots=1, vectors=False)
    measurement._warm_up(engine, whole=False)
    with pytest.raises(StepFailure, match="no use case embed") as caught:
        vectors(engine, "wool.")
    assert caught.value.reason is FailureReason.INVALID_REQUEST


def test_a_model_without_a_classifier_is_not_made_to_rank(make: MakeEngine) -> None:
    with pytest.raises(ModelUnsupported, match="no classifier"):
        make(slots=1, pooling="rank")
