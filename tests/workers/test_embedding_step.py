"""The execution of `embed` steps, on a real model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from app.catalog.model import PromptProfile
from app.inference.requests import EmbedRequest
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.state_machine.outcomes import Success
from workers import embedding_step
from workers.engine import OnStop
from workers.engine.engine import LlamaEngine

NEVER: OnStop = lambda _: None  # noqa: E731 the annotation needs an assignment
MINUTE = timedelta(minutes=1)


def embed(texts: Any, engine: LlamaEngine, **more: Any) -> Success:
    return embedding_step.embed(texts, engine, **{"on_stop": NEVER, "timeout": MINUTE} | more)


def failed(texts: Any, engine: LlamaEngine, **more: Any) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        embed(texts, engine, **more)
    return caught.value


def test_a_text_becomes_a_vector_and_a_list_becomes_a_list(shared: LlamaEngine) -> None:
    one, many = embed("a llama", shared), embed(["a llama", "the rates"], shared)

    assert len(one.output) == shared.model.n_embd
    assert [len(vector) for vector in many.output] == [shared.model.n_embd] * 2
    assert all(isinstance(number, float) for number in one.output)
    assert math.hypot(*one.output) == pytest.approx(1, abs=1e-4)
    assert one.output == [round(number, 6) for number in one.output]
    assert many.usage.tokens_in == one.usage.tokens_in + embed("the rates", shared).usage.tokens_in
    assert embed([], shared).output == []


def test_long_lists_keep_their_order(shared: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_step, "_BATCH", 3)
    texts = [f"number {number}" for number in range(8)]
    found = np.array(embed(texts, shared).output)

    assert np.abs(found[7] - np.array(embed(texts[7], shared).output)).max() < 0.02
    assert np.abs(found[7] - found[0]).max() > 0.02
    assert "after the first 6 texts: text 1 has" in failed([*texts[:7], "long " * 3000], shared, long="refuse").message


def test_fewer_dimensions_are_the_first_ones_normalised(shared: LlamaEngine) -> None:
    whole, short = (np.array(embed("a llama", shared, dimensions=size).output) for size in (None, 64))

    assert short.shape == (64,)
    np.testing.assert_allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-3)
    failure = failed("a llama", shared, dimensions=5000)
    assert (failure.reason, "it must be from 1 to 576" in failure.message) == (FailureReason.INVALID_REQUEST, True)


def test_queries_and_documents_get_the_models_prefixes(shared: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = PromptProfile(query_prefix="query: ", document_prefix="passage: ")
    monkeypatch.setattr(shared, "options", shared.options.model_copy(update={"profile": profile}))
    query, document = (np.array(embed("a llama", shared, task=task).output) for task in ("query", "document"))
    bare = shared.embed(EmbedRequest(("query: a llama", "passage: a llama", "a llama")), 60).vectors

    assert np.abs(query - bare[0]).max() < 0.01
    assert np.abs(document - bare[1]).max() < 0.01
    assert min(np.abs(query - bare[2]).max(), np.abs(document - bare[2]).max()) > 0.02


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (7, "'texts' is a number; a text or a list of texts is required"),
        (None, "'texts' is null"),
        ({"a": "b"}, "'texts' is an object"),
        (["a", 1], "'texts' has a number at index 1; a text is required"),
        (["a", ["b"]], "'texts' has a list at index 1"),
        (["a", ""], "the text at index 1 is empty"),
        (["a"] * 2049, "at most 2048: map over parts"),
    ],
)
def test_input_other_than_texts_is_rejected(shared: LlamaEngine, texts: Any, problem: str) -> None:
    failure = failed(texts, shared)
    assert (failure.reason, problem in failure.message) == (FailureReason.INVALID_REQUEST, True)


def test_a_step_is_cancelled_between_two_decodes(shared: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second decode cancels the step, so that some texts are embedded and others are not."""
    shared.embed(EmbedRequest(("warm",)), 60)
    context, stops, computed = shared._embeddings, list[Callable[[], None]](), list[int]()
    assert context is not None
    compute, known = context.compute, threading.Event()

    def on_stop(stop: Callable[[], None]) -> None:
        stops.append(stop)
        known.set()

    def counted(parts: Any) -> Any:
        computed.append(len(parts))
        if len(computed) == 2:
            assert known.wait(60)
            stops[0]()
        return compute(parts)

    monkeypatch.setattr(context, "compute", counted)
    monkeypatch.setattr(embedding_step, "_BATCH", 256)
    with pytest.raises(CancelledError):
        embed(["a"] * 256, shared, on_stop=on_stop)
    assert computed == [64, 64]
    assert len(embed("still there", shared).output) == shared.model.n_embd


def test_a_step_that_is_cancelled_before_its_start_does_nothing(shared: LlamaEngine) -> None:
    before = shared.metrics().embedded_texts
    with pytest.raises(CancelledError):
        embed("a", shared, on_stop=lambda stop: stop())
    embed("b", shared)
    assert shared.metrics().embedded_texts == before + 1


def test_a_step_has_a_timeout_for_all_its_texts(shared: LlamaEngine) -> None:
    failure = failed(["a llama"] * 300, shared, timeout=timedelta(milliseconds=1))
    assert (failure.reason, failure.message) == (FailureReason.TIMEOUT, "no text was embedded after 0.001 s")
