"""
Dialogues for the engine's benchmark: prompts of 50 to 900 tokens, answers of 8 to 96, greedy, read while written.

`closed` keeps 8 requests under way. `chat` is 8 users over 5 turns, each turn with all that was said. `arrivals` come
by Poisson's law. `beside` is one person, who thinks for 1 to 4 s before each question, beside 16 texts that nobody
reads. `one` is a single stream. Each is driven in the same way on the engine and on llama.cpp's server.
"""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

from benchmarks.engine_runs import WORDS, Figures, engine_of, greedy, server_of

USERS, TURNS, BATCH_TEXTS = 8, 5, 16

#: Writes one text; calls back at each piece of it.
Write = Callable[[str, int, bool, Callable[[], None]], None]


@dataclass
class Answer:
    """One answer: when it was requested, and when its tokens came."""

    sent: float
    tokens: int
    is_read: bool = True
    times: list[float] = field(default_factory=list)


def talk(rng: random.Random, tokens: int) -> str:
    """Sentences of a conversation; every word and every mark is a token of SmolLM2, or nearly."""
    said, count = [f"{rng.choice(WORDS)} {rng.randrange(10)}"], 3
    while count < tokens:
        mark = rng.choice(("", "", "", "", ",", ".", "?"))
        said.append(rng.choice(WORDS) + mark)
        count += 1 + bool(mark)
    return " ".join(said)


def run_dialogue(spec: dict[str, Any]) -> Figures:
    """One workload on one peer. `spec` has `peer` (engine or server), `kind`, `seed`, `requests`, and `rate`."""
    rng = random.Random(spec["seed"])
    with ExitStack() as stack:
        write = _engine(spec, stack) if spec["peer"] == "engine" else _server(spec)
        for tokens in (300, 60, 500):  # both learn how fast the machine is
            write(talk(rng, tokens), 24, True, lambda: None)
        answers: list[Answer] = []
        began = perf_counter()
        _DRIVERS[spec["kind"]](spec, rng, write, answers)
        wall = perf_counter() - began
    return _figures(answers, wall)


def _engine(spec: dict[str, Any], stack: ExitStack) -> Write:
    from app.inference.requests import GenerateRequest, PriorityClass

    engine = engine_of(spec)
    stack.callback(engine.close)

    def write(prompt: str, tokens: int, is_read: bool, note: Callable[[], None]) -> None:
        priority = PriorityClass.BATCH
        if is_read:
            priority = PriorityClass.INTERACTIVE if spec["kind"] == "beside" else PriorityClass.STANDARD
        request = GenerateRequest(prompt=prompt, max_tokens=tokens, sampling=greedy(logit_bias={}), priority=priority)
        engine.generate(request, (lambda _: note()) if is_read else None).result()

    return write


def _server(spec: dict[str, Any]) -> Write:
    server = server_of(spec)

    def write(prompt: str, tokens: int, _: bool, note: Callable[[], None]) -> None:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "stream": True}

        def take(event: Any) -> None:
            if isinstance(event, dict) and event.get("choices") and event["choices"][0]["finish_reason"] is None:
                note()

        server.handle_completions(body, take)

    return write


def _ask(write: Write, prompt: str, tokens: int, answers: list[Answer], *, is_read: bool = True) -> None:
    answer = Answer(perf_counter(), tokens, is_read)
    answers.append(answer)
    write(prompt, tokens, is_read, lambda: answer.times.append(perf_counter()))
    if not is_read:
        answer.times.append(perf_counter())


def _closed(spec: dict[str, Any], rng: random.Random, write: Write, answers: list[Answer]) -> None:
    asked = [(talk(rng, rng.randint(50, 900)), rng.randint(8, 96)) for _ in range(spec["requests"])]
    with ThreadPoolExecutor(USERS) as threads:
        list(threads.map(lambda one: _ask(write, one[0], one[1], answers), asked))


def _chat(_: dict[str, Any], rng: random.Random, write: Write, answers: list[Answer]) -> None:
    def one(user: random.Random) -> None:
        said = talk(user, user.randint(50, 200))
        for _turn in range(TURNS):
            _ask(write, said, user.randint(8, 96), answers)
            said += f"\n{talk(user, 40)}\n{talk(user, user.randint(20, 60))}"

    with ThreadPoolExecutor(USERS) as threads:
        list(threads.map(one, [random.Random(rng.random()) for _ in range(USERS)]))


def _arrivals(spec: dict[str, Any], rng: random.Random, write: Write, answers: list[Answer]) -> None:
    timer = threading.Event()
    with ThreadPoolExecutor(spec["requests"]) as threads:
        for _ in range(spec["requests"]):
            prompt, tokens = talk(rng, rng.randint(50, 900)), rng.randint(8, 96)
            threads.submit(_ask, write, prompt, tokens, answers)
            timer.wait(rng.expovariate(spec["rate"]))


def _beside(_: dict[str, Any], rng: random.Random, write: Write, answers: list[Answer]) -> None:
    texts = [(talk(rng, rng.randint(50, 900)), rng.randint(64, 192)) for _ in range(BATCH_TEXTS)]
    with ThreadPoolExecutor(BATCH_TEXTS) as threads:
        batch = [threads.submit(_ask, write, *one, answers, is_read=False) for one in texts]
        while wait(batch, timeout=rng.uniform(1, 4)).not_done:  # the person thinks
            _ask(write, talk(rng, rng.randint(50, 300)), rng.randint(8, 48), answers)


def _one(spec: dict[str, Any], rng: random.Random, write: Write, answers: list[Answer]) -> None:
    for _ in range(max(4, spec["requests"] // 8)):
        _ask(write, talk(rng, rng.randint(50, 400)), 96, answers)


_DRIVERS = {"closed": _closed, "chat": _chat, "arrivals": _arrivals, "beside": _beside, "one": _one}


def _figures(answers: Sequence[Answer], wall: float) -> Figures:
    read = [answer for answer in answers if answer.is_read]
    first = sorted(answer.times[0] - answer.sent for answer in read)
    whole = sorted(answer.times[-1] - answer.sent for answer in read)
    gaps = sorted(later - earlier for answer in read for earlier, later in pairwise(answer.times))
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / wall,
        "requests_per_s": len(answers) / wall,
        "first_p50_s": statistics.median(first),
        "first_p99_s": _percentile(first, 0.99),
        "whole_p50_s": statistics.median(whole),
        "gap_p50_ms": 1000 * statistics.median(gaps),
        "gap_p99_ms": 1000 * _percentile(gaps, 0.99),
    }


def _percentile(values: Sequence[float], part: float) -> float:
    return values[round(part * (len(values) - 1))]
