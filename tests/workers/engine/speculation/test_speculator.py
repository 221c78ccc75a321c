"""
Drafts on the real model: texts and their ends are those of decoding one token at a time.

Drafts are taken whenever there is a prediction, whatever they cost, so that what is tested happens on every machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from app.inference.requests import ChatMessage, FinishReason, GenerateRequest, Sampling
from tests.workers.engine.test_engine import NOISE, Gaps
from workers.engine import loop as loop_module
from workers.engine.engine import LlamaEngine
from workers.engine.options import KvLayout
from workers.engine.speculation.speculator import Speculator
from workers.engine.tasks import EngineTask

MakeEngine = Callable[..., LlamaEngine]

GREEDY = Sampling(temperature=0)
LIST = "red apple, green pear, yellow plum, blue grape, white peach"
COPY = f"The list: {LIST}.\nThe list again: {LIST}.\nThe list again:"


class EagerSpeculator(Speculator):
    """Takes every prediction."""

    def _chosen(self, tasks: Sequence[EngineTask], room: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for task in tasks:
            draft = self._draft(task)
            reach = [] if draft is None else draft.reach(task.request.max_tokens - task.written - 1)
            count = min(len(reach), 7, room)
            if count > 0 and draft is not None and task.work is not None:
                found[task.work.sequence] = draft.take(count)
                room -= count
        return found


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch, make: MakeEngine) -> MakeEngine:
    """Engines that take every prediction."""
    monkeypatch.setattr(loop_module, "Speculator", EagerSpeculator)
    return lambda **options: make(**{"slots": 1, "context": 1024, "speculation": "auto"} | options)


def ask(prompt: str = COPY, tokens: int = 40, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=tokens, **{"sampling": GREEDY} | more)


def accepted(engine: LlamaEngine) -> int:
    figures = engine.metrics()
    assert figures.tokens_drafted >= figures.tokens_accepted
    return figures.tokens_accepted


def require_settled(engine: LlamaEngine) -> None:
    """No cell is lost, and the cache holds what the accounting says."""
    slots, context = engine._loop.slots, engine._loop.context
    assert not slots.running
    assert not slots._drafted
    assert slots.cells.reserved_unused() == 0
    for sequence in slots.index.kept:
        assert context.positions(sequence)[1] + 1 == slots.cells.length(sequence) == len(slots.index.tokens(sequence))


@pytest.mark.parametrize("layout", [KvLayout.UNIFIED, pytest.param(KvLayout.STREAMS, marks=pytest.mark.storm)])
def test_texts_with_drafts_differ_by_kernel_noise_only(eager: MakeEngine, model_path: Path, layout: KvLayout) -> None:
    engine = eager(slots=3, context=3072, layout=layout)
    prompts = [COPY, COPY.replace("apple", "cherry"), "Once upon a time in a small village"]
    tickets = [engine.generate(ask(prompt, 16)) for prompt in prompts]
    texts = [ticket.result(60).text for ticket in tickets]
    assert accepted(engine) > 10
    gaps = Gaps(model_path, prompts)
    try:
        assert max(gaps.largest(p, text) for p, text in zip(prompts, texts, strict=True)) < NOISE
    finally:
        gaps.llama.close()
    require_settled(engine)


def test_the_same_text_and_end_as_without_drafts(eager: MakeEngine) -> None:
    """Also the length, a stop text, and an end, each inside a draft."""
    engine, plain = eager(), eager(speculation="off")
    requests = [
        ask(tokens=17),
        ask(stop=("pear, yel",)),
        ask(tokens=16, sampling=Sampling(temperature=0, repeat_penalty=1.05)),
        GenerateRequest(messages=(ChatMessage("user", f"Say only this: {LIST}"),), max_tokens=48, sampling=GREEDY),
    ]
    for request in requests:
        texts = [each.generate(request).result(60) for each in (engine, plain)]
        assert texts[0].text == texts[1].text
        assert (texts[0].finish, texts[0].tokens_out) == (texts[1].finish, texts[1].tokens_out)
        require_settled(engine)
    assert texts[0].finish is FinishReason.STOP
    assert accepted(engine) > 20
    assert plain.metrics().tokens_drafted == 0


def test_random_numbers_are_those_of_a_text_without_drafts(eager: MakeEngine) -> None:
    engine, plain = eager(), eager(speculation="off")
    sampling = Sampling(temperature=1.0, top_k=40, seed=5)
    texts = [each.generate(ask(tokens=28, sampling=sampling)).result(60).text for each in (engine, plain)]
    assert texts[0] == texts[1]
    assert 0 < accepted(engine) < engine.metrics().tokens_drafted


def test_a_grammar_applies_inside_a_draft(eager: MakeEngine) -> None:
    """The model would copy the list; the grammar ends it after the second comma."""
    engine, plain = eager(), eager(speculation="off")
    grammar = 'root ::= " " [a-z ]{1,9} ", " [a-z ]{1,10} ";"'
    texts = [each.generate(ask(tokens=24, grammar=grammar)).result(60) for each in (engine, plain)]
    assert texts[0].text == texts[1].text
    assert texts[0].text.endswith(";")
    assert accepted(engine)
    require_settled(engine)


def test_a_text_that_is_cancelled_amid_drafts_leaves_nothing(eager: MakeEngine) -> None:
    engine = eager(slots=2, context=2048)
    started = threading.Event()
    endless = Sampling(temperature=0, ignore_end=True)
    ticket = engine.generate(ask(tokens=800, sampling=endless), lambda _: started.set())
    assert started.wait(60)
    ticket.cancel()
    with pytest.raises(CancelledError):
        ticket.result(60)
    assert engine.generate(ask(tokens=8)).result(60).text
    require_settled(engine)


def test_texts_without_drafts(eager: MakeEngine) -> None:
    """Log-probabilities, and the reproducible mode."""
    engine = eager()
    assert engine.generate(ask(tokens=8, logprobs=2)).result(60).logprobs
    assert engine.metrics().tokens_drafted == 0
    reproducible = eager(reproducible=True)
    off = eager(reproducible=True, speculation="off")
    texts = [each.generate(ask(tokens=24)).result(60).text for each in (reproducible, off)]
    assert texts[0] == texts[1]
    assert reproducible.metrics().tokens_drafted == 0


def test_a_cache_that_cannot_be_truncated_is_computed_again(eager: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plain = eager(), eager(speculation="off")
    context = engine._loop.context
    monkeypatch.setattr(context, "truncate", lambda sequence, *_: not context.drop(sequence))
    prompt = COPY + " red apple, green pear, black"
    texts = [each.generate(ask(prompt, 24)).result(60) for each in (engine, plain)]
    assert texts[0].tokens_out == texts[1].tokens_out
    assert engine.metrics().tokens_computed > plain.metrics().tokens_computed
    require_settled(engine)
