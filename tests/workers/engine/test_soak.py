"""Thousands of random requests on tiny models: no leaks, no stuck requests, recurrent states are never truncated."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.inference.requests import ChatMessage, GenerateRequest, PriorityClass, Sampling
from app.kernel import clock
from app.kernel.errors import StepFailure
from workers.engine.engine import LlamaEngine
from workers.engine.options import KvLayout

MakeEngine = Callable[..., LlamaEngine]

SCHEMAS = [
    {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]},
]
STARTS = ["", "You are a careful helper who answers in short words. " * 6, "Once upon a time " * 20]
#: Requests over both layouts; 10,000 take three minutes.
TOTAL = int(os.environ.get("SOAK_REQUESTS", "600"))


def random_request(random: random.Random) -> GenerateRequest:
    more: dict[str, Any] = {}
    if random.random() < 0.1:
        more["schema"] = random.choice(SCHEMAS)
    elif random.random() < 0.1:
        more["grammar"] = 'root ::= [a-z]{1,6} "."'
    if random.random() < 0.2:
        more["stop"] = ("a", "the ")
    if random.random() < 0.05:
        more["deadline"] = clock.now() + timedelta(seconds=random.choice([0.005, 5]))
    if random.random() < 0.05:
        more["n"] = random.randint(2, 4)
    if random.random() < 0.05:
        more["logprobs"] = random.randint(0, 5)
    temperature = random.choice([0.0, 0.0, 0.8, 1.5])
    penalty = random.choice([1.0, 1.0, 1.2])
    sampling = Sampling(temperature=temperature, repeat_penalty=penalty, top_k=random.choice([40, 0, 5]))
    words = random.choice(STARTS) + " ".join(
        random.choices(["llama", "hill", "stone", "ü", "🙂"], k=random.randint(1, 30))
    )
    if random.random() < 0.5:
        more["messages"] = (ChatMessage("user", words),)
    else:
        more["prompt"] = words
    return GenerateRequest(
        max_tokens=random.randint(1, 24), sampling=sampling, priority=random.choice(list(PriorityClass)), **more
    )


@pytest.mark.storm
@pytest.mark.parametrize("layout", list(KvLayout))
def test_thousands_of_requests_leak_nothing(make: MakeEngine, tiny_llama: Path, layout: KvLayout) -> None:
    engine = make(tiny_llama, slots=6, context=6 * 512, layout=layout, kept=5, park_bytes=2**20, park_progress=2)
    generator = random.Random(4)
    outcomes: Counter[str] = Counter()
    process, resident = psutil.Process(), []
    for round_number in range(TOTAL // 2 // 100):
        tickets = []
        for _ in range(100):
            try:
                tickets.append(engine.generate(random_request(generator)))
            except StepFailure as failure:
                outcomes[failure.reason] += 1
        for ticket in generator.sample(tickets, 12):
            ticket.cancel()
        for ticket in tickets:
            try:
                ticket.result(60)
                outcomes["done"] += 1
            except CancelledError:
                outcomes["cancelled"] += 1
            except StepFailure as failure:
                outcomes[failure.reason] += 1
        if round_number % max(1, TOTAL // 1000) == 0:
            gc.collect()
            resident.append(process.memory_info().rss)
    figures = engine.metrics()
    assert sum(outcomes.values()) == TOTAL // 2
    assert outcomes["done"] > TOTAL // 2 * 0.7, outcomes
    assert not outcomes["engine_error"] + outcomes["internal"], outcomes
    assert (figures.running, figures.waiting, figures.parked_now, figures.rebuilt) == (0, 0, 0, 0)
    assert figures.submitted == figures.finished + figures.failed + figures.cancelled + figures.timed_out
    assert figures.parked == figures.resumed or figures.cancelled + figures.timed_out
    slots = engine._loop.slots
    assert not slots.running
    assert slots._free | set(slots.index.kept) == set(range(engine.options.sequences))
    assert slots.cells.reserved_unused() == 0
    assert slots.cells.used == slots.cells.held_by(slots.index.kept)
    assert max(resident[1:]) - resident[1] < 24 * 2**20, [size // 2**20 for size in resident]


def test_kept_recurrent_states_do_not_change_texts(make: MakeEngine, tiny_mamba: Path) -> None:
    kept, plain = make(tiny_mamba, slots=3, context=3072), make(tiny_mamba, slots=1, context=3072, reuse=False)
    assert kept.model.recurrent
    assert not kept._loop.speculator.is_on
    talk: list[ChatMessage] = []
    cached = 0
    for turn in ("How are you today, my friend?", "And what of the weather?", "Tell me more."):
        talk.append(ChatMessage("user", turn))
        request = GenerateRequest(messages=tuple(talk), max_tokens=7, sampling=Sampling(temperature=0, ignore_end=True))
        texts = [engine.generate(request).result(60) for engine in (kept, plain)]
        assert texts[0].text == texts[1].text
        cached += texts[0].tokens_cached
        talk.append(ChatMessage("assistant", texts[0].text))
    assert cached > 0
    requests = [
        GenerateRequest(prompt="x y z " * 20 + str(n % 4), max_tokens=9, sampling=Sampling(temperature=0))
        for n in range(12)
    ]
    tickets = [kept.generate(request) for request in requests]
    assert [ticket.result(60).text for ticket in tickets] == [plain.generate(r).result(60).text for r in requests]


def test_interactive_requests_park_others_and_all_requests_end(make: MakeEngine, tiny_llama: Path) -> None:
    engine = make(tiny_llama, slots=2, context=2048, park_progress=4)
    alone = make(tiny_llama, slots=1, context=2048, reuse=False)
    sampling = Sampling(temperature=0, ignore_end=True)
    started = threading.Event()
    slow = [
        GenerateRequest(prompt=f"Long work {n}", max_tokens=300, sampling=sampling, priority=PriorityClass.BATCH)
        for n in range(4)
    ]
    tickets = [engine.generate(request, lambda _: started.set()) for request in slow]
    assert started.wait(60)
    for n in range(40):
        urgent = GenerateRequest(
            prompt=f"Quick {n}", max_tokens=5, sampling=sampling, priority=PriorityClass.INTERACTIVE
        )
        assert engine.generate(urgent).result(60).tokens_out == 5
    texts = [ticket.result(60).text for ticket in tickets]
    figures = engine.metrics()
    assert figures.parked == figures.resumed > 0
    assert [text[:40] for text in texts] == [alone.generate(request).result(60).text[:40] for request in slow]
