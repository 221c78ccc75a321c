"""
Drafts on the real model: texts and their ends are those of decoding one token at a time.

Drafts are taken whenever there is a prediction, whatever they cost, so that what is tested happens on every machine.
"""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from app.inference.requests import ChatMessage, FinishReason, GenerateRequest, Sampling
from tests.workers.engine.speculation.conftest import GREEDY, Pair, engines, require_settled
from tests.workers.engine.test_engine import NOISE, Gaps
from workers.engine.metrics import Meter
from workers.engine.options import KvLayout
from workers.engine.speculation.speculator import Speculator
from workers.engine.tasks import EngineTask

LIST = "red apple, green pear, yellow plum, blue grape, white peach"
COPY = f"The list: {LIST}.\nThe list again: {LIST}.\nThe list again:"


def ask(prompt: str = COPY, tokens: int = 40, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=tokens, **{"sampling": GREEDY} | more)


@pytest.mark.parametrize("layout", [KvLayout.UNIFIED, pytest.param(KvLayout.STREAMS, marks=pytest.mark.storm)])
def test_texts_with_drafts_differ_by_kernel_noise_only(pair: Pair, model_path: Path, layout: KvLayout) -> None:
    """Texts side by side: with drafts a decode has another shape."""
    made = pair if layout is KvLayout.UNIFIED else engines(model_path, slots=2, context=2048, layout=layout)
    prompts = [COPY, COPY.replace("apple", "cherry")]
    texts = [each.result(60) for each in [made.eager.generate(ask(prompt, 12)) for prompt in prompts]]
    assert sum(text.tokens_accepted for text in texts) > 10
    require_settled(made.eager)
    made.eager._loop.slots.evict_all()  # prompts that were computed side by side were rounded otherwise
    if made is not pair:
        made.eager.close()
        made.plain.close()
    gaps = Gaps(model_path, prompts)
    try:
        assert max(gaps.largest(p, text.text) for p, text in zip(prompts, texts, strict=True)) < NOISE
    finally:
        gaps.llama.close()


def test_the_same_text_and_end_as_without_drafts(pair: Pair) -> None:
    """Also the length, a stop text, and an end, each inside a draft."""
    requests = [
        ask(tokens=9),
        ask(stop=("pear, yel",)),
        ask(tokens=8, sampling=Sampling(temperature=0, repeat_penalty=1.05)),
        GenerateRequest(messages=(ChatMessage("user", f"Say only this: {LIST}"),), max_tokens=48, sampling=GREEDY),
    ]
    found = [pair.same(request)[0] for request in requests]
    assert found[-1].finish is FinishReason.STOP
    assert sum(text.tokens_accepted for text in found) > 20
    assert pair.plain.metrics().tokens_drafted == 0


def test_random_numbers_are_those_of_a_text_without_drafts(pair: Pair) -> None:
    found, *_ = pair.same(ask(tokens=20, sampling=Sampling(temperature=1.0, top_k=40, seed=5)))
    assert 0 < found.tokens_accepted < found.tokens_drafted


def test_a_grammar_applies_inside_a_draft(pair: Pair) -> None:
    """The model would copy the list; the grammar ends it after the second comma."""
    found, *_ = pair.same(ask(tokens=24, grammar='root ::= " " [a-z ]{1,9} ", " [a-z ]{1,10} ";"'))
    assert found.text.endswith(";")
    assert found.tokens_accepted


def test_a_text_that_is_cancelled_amid_drafts_leaves_nothing(pair: Pair) -> None:
    started = threading.Event()
    endless = Sampling(temperature=0, ignore_end=True)
    ticket = pair.eager.generate(ask(tokens=800, sampling=endless), lambda _: started.set())
    assert started.wait(60)
    ticket.cancel()
    with pytest.raises(CancelledError):
        ticket.result(60)
    assert pair.same(ask(tokens=8))[0].text


def test_texts_without_drafts(pair: Pair, model_path: Path) -> None:
    """Log-probabilities, and the reproducible mode."""
    plain = pair.eager.generate(ask(tokens=8, logprobs=2)).result(60)
    assert plain.logprobs
    assert plain.tokens_drafted == 0
    made = engines(model_path, slots=1, context=1024, reproducible=True)
    try:
        assert made.same(ask(tokens=8))[0].tokens_drafted == 0
    finally:
        made.eager.close()
        made.plain.close()


def test_a_cache_that_cannot_be_truncated_is_computed_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    context, before = pair.eager._loop.context, pair.eager.metrics().tokens_computed
    monkeypatch.setattr(context, "truncate", lambda sequence, *_: not context.drop(sequence))
    prompt = COPY + " red apple, green pear, black"
    found, *_ = pair.same(ask(prompt, 10))
    assert pair.eager.metrics().tokens_computed - before > 1.5 * found.tokens_in


def test_looking_for_predictions_counts_as_a_loss(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """While drafts pause nobody looks for predictions."""
    speculator, drafted = Speculator(pair.plain._loop.model, pair.eager._loop.options, Meter()), []
    assert speculator._balance.may_draft(0.01)
    speculator._tokens, speculator._looking = -1, 1.0
    speculator.decoded([], 2.0)
    assert not speculator._balance.may_draft(0.01)
    monkeypatch.setattr(speculator, "_draft", drafted.append)
    speculator._costs.record(1, 0.01)
    for _ in range(9):
        speculator._costs.record(1, 0.01)
    assert speculator._costs.known(1)
    task = EngineTask(0, ask(), (), (), None, 0, None, None)
    assert not speculator._chosen([task], 8)
    assert not drafted
