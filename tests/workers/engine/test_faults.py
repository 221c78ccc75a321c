"""Faults of llama.cpp affect only the requests concerned."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.inference.requests import EmbedRequest, GenerateRequest, Sampling
from app.kernel.errors import FailureReason, MemoryNotEnough, StepFailure
from workers.engine import loop as loop_module
from workers.engine.bindings.llama import Context
from workers.engine.engine import LlamaEngine
from workers.engine.threads import DecodeKind

MakeEngine = Callable[..., LlamaEngine]


def ask(prompt: str, tokens: int = 20) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=tokens, sampling=Sampling(temperature=0, ignore_end=True))


class Faulty:
    """Replaces a context's decode: returns or raises the next of `codes` instead of decoding, while there are any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[Any] = []
        self.poisoned = -1
        real = Context.decode

        def decode(context: Context, pieces: Any) -> int:
            if any(self.poisoned in part for _, _, part, _ in pieces):
                return -1
            code = self.codes.pop(0) if self.codes else 0
            if isinstance(code, Exception):
                raise code
            return code or real(context, pieces)

        monkeypatch.setattr(Context, "decode", decode)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(monkeypatch)


def test_a_bad_request_does_not_affect_others(make: MakeEngine, faulty: Faulty) -> None:
    engine = make(slots=3, context=2048)
    expected = engine.generate(ask("The sun")).result(60).text
    faulty.poisoned = engine.model.tokenize(" zebra", add_special=False, parse_special=False)[0]
    tickets = [
        engine.generate(ask("The sun")),
        engine.generate(ask("A zebra zebra is")),
        engine.generate(ask("The sun")),
    ]
    with pytest.raises(StepFailure) as caught:
        tickets[1].result(60)
    assert caught.value.reason is FailureReason.ENGINE_ERROR
    assert tickets[0].result(60).text == tickets[2].result(60).text == expected


@pytest.mark.parametrize("fault", [2, -2, -3, RuntimeError("a bug")])
def test_texts_continue_after_a_fault_of_the_backend(make: MakeEngine, faulty: Faulty, fault: Any) -> None:
    engine = make(slots=2, context=2048)
    expected = [engine.generate(ask(prompt)).result(60).text for prompt in ("One day", "The moon")]
    faulty.codes = [0, 0, 0, fault]
    tickets = [engine.generate(ask(prompt)) for prompt in ("One day", "The moon")]
    assert [ticket.result(60).tokens_out for ticket in tickets] == [20, 20]
    assert [ticket.result(60).text[:10] for ticket in tickets] == [text[:10] for text in expected]
    assert engine.metrics().rebuilt == 1
    assert engine.generate(ask("One day")).result(60).text


def test_threads_that_were_chosen_and_their_limit_outlive_a_fault(
    make: MakeEngine, faulty: Faulty, tiny_llama: Path
) -> None:
    """A limit reaches the context of embeddings too."""
    engine = make(tiny_llama, slots=1, context=2048, threads=None, most_threads=3)
    engine.embed(EmbedRequest(["The moon"]), timeout=60)
    embeddings, threads = engine._embeddings, engine._loop.context.threads
    assert embeddings is not None
    engine.use_threads(2)
    faulty.codes = [0, 0, 0, -3]
    assert engine.generate(ask("One day")).result(60).tokens_out == 20
    assert engine.metrics().rebuilt == 1
    assert engine._loop.context.threads is threads, "what was measured is kept"
    assert [one.chosen(DecodeKind.PROMPTS) for one in (threads, embeddings.threads)] == [2, 2]


def test_an_engine_with_repeated_faults_gives_up_and_counts_as_stalled(make: MakeEngine, faulty: Faulty) -> None:
    engine = make(slots=2, context=2048)
    faulty.codes = [-3] * 50
    tickets = [engine.generate(ask(prompt)) for prompt in ("One day", "The moon", "A cat")]
    for ticket in tickets:
        with pytest.raises(StepFailure) as caught:
            ticket.result(60)
        assert caught.value.reason is FailureReason.ENGINE_ERROR
    with pytest.raises(StepFailure, match="given up"):
        engine.generate(ask("One more"))
    assert engine.stalled_for() > timedelta(0)


def test_an_engine_that_gets_no_new_context_gives_up(
    make: MakeEngine, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(slots=1, context=2048)

    def none(*_: Any) -> Any:
        raise MemoryNotEnough("the context", 1, 0)

    monkeypatch.setattr(loop_module, "Context", none)
    faulty.codes = [-3]
    with pytest.raises(StepFailure, match="given up"):
        engine.generate(ask("One day")).result(60)
    engine.close()


def test_an_engine_with_a_failed_recovery_fails_all_requests_and_counts_as_stalled(
    make: MakeEngine, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(slots=1, context=2048)

    def broken(*_: Any) -> None:
        raise RuntimeError("the slots are lost")

    with monkeypatch.context() as patched:
        patched.setattr(loop_module.Slots, "discard", broken)
        faulty.codes = [RuntimeError("a bug")]
        tickets = [engine.generate(ask(prompt)) for prompt in ("One day", "The moon")]
        for ticket in tickets:
            with pytest.raises(StepFailure, match="given up: RuntimeError: the slots are lost"):
                ticket.result(60)
        with pytest.raises(StepFailure, match="given up"):
            engine.generate(ask("One more"))
    assert engine.stalled_for() > timedelta(0)


def test_a_full_queue_rejects_requests(make: MakeEngine) -> None:
    engine = make(slots=1, context=2048, queue=2)
    first = engine.generate(ask("One day", 400))
    second = engine.generate(ask("One day", 400))
    rejected = GenerateRequest(prompt="One day", n=3)
    with pytest.raises(StepFailure, match="queue is full") as caught:
        engine.generate(rejected)
    assert caught.value.reason is FailureReason.ENGINE_ERROR
    assert engine.metrics().refused == 3
    for ticket in (first, second):
        ticket.cancel()
