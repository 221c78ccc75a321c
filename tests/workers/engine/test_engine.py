"""The engine with the real model: its texts, and how requests end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import numpy as np
import pytest

from app.grammar import gbnf_source
from app.inference.requests import (
    ChatMessage,
    EmbedRequest,
    FinishReason,
    GenerateRequest,
    PriorityClass,
    Sampling,
    TextPiece,
)
from app.kernel import clock
from app.kernel.errors import FailureReason, StepFailure
from tests.grammar.test_gbnf_source import SOUND
from workers.engine.bindings.llama import Context, model_params
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions, KvLayout

MakeEngine = Callable[..., LlamaEngine]

GREEDY = Sampling(temperature=0)
ENDLESS = Sampling(temperature=0, ignore_end=True)
PROMPTS = [
    "The capital of France is",
    "Once upon a time in a small village",
    "Water boils when",
    "def fibonacci(n):",
    "The best way to learn a language",
    "In the year 1969",
]


def ask(prompt: str, tokens: int = 12, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=tokens, **{"sampling": GREEDY} | more)


def chat(text: str, tokens: int = 24, **more: Any) -> GenerateRequest:
    return GenerateRequest(messages=(ChatMessage("user", text),), max_tokens=tokens, **{"sampling": GREEDY} | more)


def plain_llama(path: Path, prompts: list[str], tokens: int, *, flash: bool) -> list[str]:
    # With weights as the engine loads them: ggml's kernels for repacked ones add in another order.
    params = model_params(EngineOptions())
    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", return_value=params):
        llama = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=1, n_threads_batch=1, flash_attn=flash, verbose=False)
    try:
        found = []
        for prompt in prompts:
            llama.reset()
            found.append(llama.create_completion(prompt, max_tokens=tokens, temperature=0)["choices"][0]["text"])
        return found
    finally:
        llama.close()


@pytest.mark.parametrize("flash", [True, False])
def test_one_slot_writes_the_same_as_llama(make: MakeEngine, model_path: Path, flash: bool) -> None:
    engine = make(slots=1, context=1024, reuse=False, flash_attention=flash)
    texts = [engine.generate(ask(prompt)).result(60).text for prompt in PROMPTS]
    assert texts == plain_llama(model_path, PROMPTS, 12, flash=flash)


def test_one_slot_writes_the_same_as_llama_with_gemma(make: MakeEngine, gemma_path: Path) -> None:
    engine = make(gemma_path, slots=1, context=1024, reuse=False, flash_attention=True)
    texts = [engine.generate(ask(prompt, 12)).result(60).text for prompt in PROMPTS[:3]]
    assert texts == plain_llama(gemma_path, PROMPTS[:3], 12, flash=True)


def test_reproducible_texts_do_not_depend_on_other_requests(make: MakeEngine) -> None:
    engine = make(slots=4, context=2048, reproducible=True)
    alone = [engine.generate(ask(prompt)).result(60).text for prompt in PROMPTS]
    together = [engine.generate(ask(prompt)) for prompt in PROMPTS]
    assert [ticket.result(60).text for ticket in together] == alone


class Gaps:
    """Measures how far each written token is below the best one of a single plain sequence, in logits."""

    def __init__(self, path: Path, prompts: list[str]) -> None:
        """Compute what the prompts have in common, once."""
        self.llama = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
        tokenized = [self._tokens(prompt) for prompt in prompts]
        columns = zip(*(tokens[:-1] for tokens in tokenized), strict=False)
        self.common = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        self.llama.eval(self.common)
        self.state = self.llama.save_state()

    def _tokens(self, prompt: str) -> list[int]:
        return self.llama.tokenize(prompt.encode(), special=False)

    def largest(self, prompt: str, text: str) -> float:
        """Compute only the logits that are compared: with Gemma, those of one token are 1 MiB."""
        part = self._tokens(prompt)[len(self.common) :]
        gaps = [0.0]
        self.llama.load_state(self.state)
        for token in self.llama.tokenize(text.encode(), add_bos=False, special=False):
            self.llama.eval(part)
            row = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.llama.ctx), shape=(self.llama.n_vocab(),))
            gaps.append(float(row.max() - row[token]))
            part = [token]
        return max(gaps)


#: Kernel noise between batch shapes, in logits; their standard deviation is 6.3 here. See docs/engine.md.
NOISE = 0.6


@pytest.mark.parametrize("layout", list(KvLayout))
@pytest.mark.parametrize("reuse", [pytest.param(True, marks=pytest.mark.storm), False])
def test_concurrent_texts_differ_by_kernel_noise_only(
    make: MakeEngine, model_path: Path, layout: KvLayout, reuse: bool
) -> None:
    engine = make(slots=4, context=4096, layout=layout, reuse=reuse)
    system = "You answer briefly and you never lie about anything. " * 4
    prompts = [system + prompt for prompt in PROMPTS]
    tickets = [engine.generate(ask(prompt)) for prompt in prompts]
    texts = [ticket.result(60) for ticket in tickets]
    assert (engine.metrics().tokens_reused > 0) == reuse
    gaps = Gaps(model_path, prompts)
    try:
        assert max(gaps.largest(p, t.text) for p, t in zip(prompts, texts, strict=True)) < NOISE
    finally:
        gaps.llama.close()


@pytest.mark.parametrize("swa_full", [True, pytest.param(False, marks=pytest.mark.storm)])
def test_prefixes_longer_than_a_sliding_window_are_shared_correctly(
    make: MakeEngine, gemma_path: Path, swa_full: bool
) -> None:
    """Gemma's window is 512 tokens: a truncated sequence may lack positions that it attends to."""
    engine = make(gemma_path, slots=3, context=6144, swa_full=swa_full)
    system = "The people of the high mountains have kept llamas for thousands of years. " * 45
    prompts = [f"{system}\nQuestion {n}: what is the number {n} in words?\nAnswer:" for n in range(2)]
    first = engine.generate(ask(prompts[0], 8)).result(100)
    assert first.tokens_in > 600
    later = [engine.generate(ask(prompt, 8)) for prompt in (prompts[1], prompts[0])]
    texts = [first, *(ticket.result(100) for ticket in later)]
    assert not swa_full or all(text.tokens_cached > 600 for text in texts[1:])
    gaps = Gaps(gemma_path, prompts)
    try:
        for prompt, text in zip([*prompts, prompts[0]], texts, strict=True):
            assert gaps.largest(prompt, text.text) < NOISE
    finally:
        gaps.llama.close()


def test_a_conversation_reuses_its_own_cache(shared: LlamaEngine) -> None:
    first = [ChatMessage("user", "Name one animal of the Andes and tell me how it lives there.")]
    answer = shared.generate(GenerateRequest(messages=tuple(first), max_tokens=20, sampling=GREEDY)).result(60)
    second = (*first, ChatMessage("assistant", answer.text), ChatMessage("user", "And another one?"))
    result = shared.generate(GenerateRequest(messages=second, max_tokens=8, sampling=GREEDY)).result(60)
    assert result.tokens_cached >= answer.tokens_in + answer.tokens_out - 2


def test_a_prefix_of_concurrent_requests_is_computed_once(make: MakeEngine) -> None:
    engine = make(slots=4, context=4096)
    system = "The following are facts about llamas that everybody should know. " * 20
    tickets = [engine.generate(ask(f"{system} Fact number {index}:", 4)) for index in range(4)]
    results = [ticket.result(60) for ticket in tickets]
    computed = engine.metrics().tokens_computed
    assert computed < results[0].tokens_in + 4 * 20
    assert sum(result.tokens_cached > 200 for result in results) == 3


def test_streamed_pieces_join_to_the_text(shared: LlamaEngine) -> None:
    pieces: list[str] = []
    result = shared.generate(chat("Write three emojis and the word naïve."), pieces.append).result(60)
    assert "".join(pieces) == result.text
    assert len(pieces) > 3


def test_a_failing_reader_does_not_affect_the_text(shared: LlamaEngine) -> None:
    def broken(text: str) -> None:
        raise ValueError(text)

    tickets = [shared.generate(chat("Hello there"), broken), shared.generate(chat("Hello there"))]
    assert tickets[0].result(60).text == tickets[1].result(60).text


def test_a_stop_text_ends_the_text_before_it(shared: LlamaEngine) -> None:
    whole = shared.generate(ask(PROMPTS[1], 40, sampling=ENDLESS)).result(60).text
    stop = whole[30:36]
    result = shared.generate(ask(PROMPTS[1], 40, sampling=ENDLESS, stop=("never said", stop))).result(60)
    assert result.text == whole.split(stop)[0]
    assert result.finish is FinishReason.STOP


def test_the_maximum_length_is_respected(shared: LlamaEngine) -> None:
    result = shared.generate(ask(PROMPTS[0], 7, sampling=ENDLESS)).result(60)
    assert (result.tokens_out, result.finish) == (7, FinishReason.LENGTH)


def test_a_cancelled_request_ends_within_a_step_and_others_continue(make: MakeEngine) -> None:
    engine = make(slots=2, context=2048)
    started = threading.Event()
    long = engine.generate(ask(PROMPTS[0], 900, sampling=ENDLESS), lambda _: started.set())
    other = engine.generate(ask(PROMPTS[1], 20))
    assert started.wait(60)
    decodes = engine.metrics().decodes
    long.cancel()
    long.cancel()
    with pytest.raises(CancelledError):
        long.result(60)
    assert engine.metrics().decodes - decodes <= 3
    assert other.result(60).text
    assert engine.metrics().cancelled == 1


def test_a_waiting_request_can_be_cancelled(make: MakeEngine) -> None:
    engine = make(slots=1, context=2048)
    first = engine.generate(ask(PROMPTS[0], 200, sampling=ENDLESS))
    second = engine.generate(ask(PROMPTS[1], 200))
    second.cancel()
    with pytest.raises(CancelledError):
        second.result(60)
    first.cancel()
    with pytest.raises(CancelledError):
        first.result(60)


def test_a_deadline_ends_a_text_and_keeps_it(make: MakeEngine) -> None:
    engine = make(slots=1, context=8192)
    deadline = clock.now() + timedelta(seconds=3)
    with pytest.raises(StepFailure) as caught:
        engine.generate(ask(PROMPTS[0], 4000, sampling=ENDLESS, deadline=deadline)).result(60)
    assert caught.value.reason is FailureReason.TIMEOUT
    assert caught.value.text
    with pytest.raises(StepFailure, match="deadline had passed"):
        engine.generate(ask(PROMPTS[0], deadline=clock.now()))


def test_a_result_can_be_awaited_repeatedly(shared: LlamaEngine) -> None:
    ticket = shared.generate(ask(PROMPTS[1], 64, sampling=ENDLESS))
    with pytest.raises(TimeoutError):
        ticket.result(0.001)
    assert ticket.result(60).tokens_out == 64


def test_an_idle_engine_is_not_stalled_and_a_working_one_makes_progress(make: MakeEngine) -> None:
    engine = make(slots=1)
    assert engine.stalled_for() == timedelta(0)
    seen = threading.Event()
    ticket = engine.generate(ask(PROMPTS[0], 50, sampling=ENDLESS), lambda _: seen.set())
    assert seen.wait(60)
    assert timedelta(0) <= engine.stalled_for() < timedelta(seconds=5)
    ticket.result(60)


def test_requests_that_can_never_be_served_are_rejected_at_once(shared: LlamaEngine) -> None:
    def rejection(request: GenerateRequest) -> StepFailure:
        with pytest.raises(StepFailure) as caught:
            shared.generate(request)
        return caught.value

    assert rejection(ask("a " * 9000)).reason is FailureReason.CONTEXT_EXCEEDED
    assert rejection(ask("a", 9000)).reason is FailureReason.CONTEXT_EXCEEDED
    for request in (
        GenerateRequest(),
        GenerateRequest(prompt="a", messages=(ChatMessage("user", "a"),)),
        ask("a", 0),
        ask("a", n=0),
        ask("a", logprobs=21),
        ask("a", sampling=Sampling(logit_bias={10**9: 1.0})),
        ask("a", sampling=Sampling(temperature=float("nan"))),
        ask("a", sampling=Sampling(seed=-1)),
        ask("a", sampling=Sampling(repeat_penalty=0)),
        ask("a", schema={"type": "object"}, grammar='root ::= "a"'),
    ):
        assert rejection(request).reason is FailureReason.INVALID_REQUEST, request


def test_several_texts_of_one_prompt_share_its_cache(make: MakeEngine) -> None:
    engine = make(slots=4, context=2048)
    sampling = Sampling(temperature=1.2, seed=5)
    request = chat("Tell me about the weather in the mountains of Peru, in winter.", 12, n=3, sampling=sampling)
    result = engine.generate(request).result(60)
    texts = [result.text, *(other.text for other in result.alternatives)]
    assert len(set(texts)) == 3
    assert [result.seed, *(other.seed for other in result.alternatives)] == [5, 6, 7]
    assert sum(other.tokens_cached > 0 for other in result.alternatives) == 2


@pytest.mark.parametrize("model", ["model_path", "gemma_path"])
def test_several_texts_of_one_prompt_differ_by_kernel_noise_only(
    make: MakeEngine, request: pytest.FixtureRequest, model: str
) -> None:
    engine = make(request.getfixturevalue(model), slots=3, context=3072)
    prompt = "The old road over the mountains was long, and the llamas that walked on it knew every stone of it. " * 3
    result = engine.generate(ask(prompt, 10, n=3)).result(60)
    gaps = Gaps(request.getfixturevalue(model), [prompt])
    try:
        for text in (result, *result.alternatives):
            assert gaps.largest(prompt, text.text) < NOISE
    finally:
        gaps.llama.close()
    assert all(text.tokens_cached > 40 for text in result.alternatives)


def test_the_same_seed_produces_the_same_text(make: MakeEngine) -> None:
    engine = make(slots=1, context=1024, reuse=False)
    request = chat("Invent a name.", 16, sampling=Sampling(temperature=1.0, seed=11))
    assert engine.generate(request).result(60).text == engine.generate(request).result(60).text


def test_pieces_have_the_text_and_the_logprobs_of_each_choice(shared: LlamaEngine) -> None:
    found: list[TextPiece] = []
    request = ask(PROMPTS[0], 12, n=3, logprobs=1, sampling=Sampling(temperature=1.2, seed=5))
    result = shared.generate(request, on_piece=found.append).result(60)
    for index, text in enumerate((result, *result.alternatives)):
        pieces = [piece for piece in found if piece.index == index]
        assert "".join(piece.text for piece in pieces) == text.text
        passed = [one for piece in pieces for one in piece.logprobs]
        assert passed == list(text.logprobs[: len(passed)]), "what follows the last text comes with the result"
        assert len(passed) >= len(text.logprobs) - 1


def test_logprobs_are_those_of_the_model(shared: LlamaEngine) -> None:
    result = shared.generate(ask(PROMPTS[0], 5, logprobs=3)).result(60)
    assert len(result.logprobs) == result.tokens_out
    assert b"".join(entry.piece for entry in result.logprobs).decode() == result.text
    for entry in result.logprobs:
        assert entry.logprob <= 0
        assert [entry.token, entry.logprob] == [entry.top[0][0], entry.top[0][2]]
        assert sum(np.exp(logprob) for _, _, logprob in entry.top) <= 1.000001


@pytest.mark.parametrize("model", ["model_path", "gemma_path"])
def test_a_parked_text_continues_byte_for_byte(make: MakeEngine, request: pytest.FixtureRequest, model: str) -> None:
    path = request.getfixturevalue(model)
    engine = make(path, slots=1, context=4096)
    batch = ask("Long ago, before there were any roads in the mountains,", 60, sampling=ENDLESS)
    alone = engine.generate(batch).result(60).text
    engine = make(path, slots=1, context=4096, reuse=False)
    shown: list[str] = []
    started = threading.Event()

    def reader(text: str) -> None:
        shown.append(text)
        if len(shown) == 10:
            started.set()

    parked = engine.generate(
        GenerateRequest(prompt=batch.prompt, max_tokens=60, sampling=ENDLESS, priority=PriorityClass.BATCH), reader
    )
    assert started.wait(60)
    urgent = engine.generate(ask(PROMPTS[3], 10, priority=PriorityClass.INTERACTIVE)).result(60)
    assert urgent.text
    assert engine.metrics().parked == 1
    assert not parked.done()
    assert parked.result(60).text == alone == "".join(shown)
    assert engine.metrics().resumed == 1


def test_all_cells_and_slots_are_released(make: MakeEngine) -> None:
    engine = make(slots=2, context=1024, reuse=False)
    tickets = [engine.generate(ask(prompt, 5)) for prompt in PROMPTS]
    tickets[1].cancel()
    for ticket in tickets:
        try:
            ticket.result(60)
        except CancelledError:
            continue
    figures = engine.metrics()
    assert (figures.running, figures.waiting, figures.cells_used, figures.prefixes_kept) == (0, 0, 0, 0)
    assert figures.submitted == len(PROMPTS) == figures.finished + figures.cancelled


def test_closing_fails_requests_with_the_reason_and_keeps_their_texts(make: MakeEngine) -> None:
    engine = make(slots=1)
    started = threading.Event()
    running = engine.generate(ask(PROMPTS[0], 500, sampling=ENDLESS), lambda _: started.set())
    waiting = [engine.generate(ask(prompt, 500, sampling=ENDLESS)) for prompt in PROMPTS[1:3]]
    assert started.wait(60)
    waiting[1].cancel()
    engine.close()
    for ticket, text in ((running, True), (waiting[0], False)):
        with pytest.raises(StepFailure, match="closed") as caught:
            ticket.result(60)
        assert caught.value.reason is FailureReason.WORKER_STOPPED
        assert bool(caught.value.text) is text
    with pytest.raises(CancelledError):
        waiting[1].result(60)
    for late in (lambda: engine.generate(ask("a")), lambda: engine.embed(EmbedRequest(("a",)))):
        with pytest.raises(StepFailure, match="closed"):
            late()
    engine.close()


def test_a_cancel_in_a_long_prompt_takes_effect_after_the_running_decode(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(slots=1, batch=64, ubatch=64, context=2048)
    decode, decoded = Context.decode, list[int]()

    def cancelled_meanwhile(context: Context, pieces: Any) -> int:
        decoded.append(sum(len(part) for _, _, part, _ in pieces))
        ticket.cancel()
        return decode(context, pieces)

    monkeypatch.setattr(Context, "decode", cancelled_meanwhile)
    with engine._loop._wake:  # the loop cannot start before `ticket` is assigned
        ticket = engine.generate(ask("The llamas walk. " * 250, 10))
    with pytest.raises(CancelledError):
        ticket.result(60)
    assert decoded == [64]


def test_many_threads_may_submit_at_once(shared: LlamaEngine) -> None:
    texts: dict[int, str] = {}

    def one(number: int) -> None:
        texts[number] = shared.generate(chat(f"Count from {number}.", 6)).result(90).text

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == list(range(12))
    assert all(texts.values())


@pytest.mark.parametrize("source", [source for source, _ in SOUND.values()], ids=list(SOUND))
def test_llama_cpp_accepts_the_grammars_of_users_that_are_accepted_here(shared: LlamaEngine, source: str) -> None:
    result = shared.generate(ask("x", 4, grammar=gbnf_source.checked(source))).result(60)
    assert result.finish in (FinishReason.STOP, FinishReason.LENGTH)
