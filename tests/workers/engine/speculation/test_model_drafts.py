"""
A draft model on the real model: texts are those without it, whatever it predicts and whatever happens to its context.

SmolLM2 drafts for itself, so nearly all of its drafts are accepted. Drafts are taken whatever they cost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from gguf import PoolingType

from app.inference.requests import GenerateRequest, PriorityClass, Sampling
from app.kernel.errors import ModelUnsupported
from tests.workers.engine.test_engine import NOISE, Gaps
from workers.engine.batch import BatchWork
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.engine import LlamaEngine
from workers.engine.options import DraftFile, EngineOptions
from workers.engine.speculation import model_planning
from workers.engine.speculation.drafting import Balance
from workers.engine.speculation.model_drafts import ModelDrafts
from workers.engine.speculation.model_planning import DraftCosts, DraftPlan, DraftRate, Step
from workers.engine.speculation.speculator import Speculator
from workers.engine.tasks import EngineTask

MakeEngine = Callable[..., LlamaEngine]

GREEDY = Sampling(temperature=0)
PROMPT = "Once upon a time in a small village"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft models draft for all texts, whatever that costs."""

    def every(rates: Sequence[float], missing: int, most: int, step: Step, costs: DraftCosts) -> DraftPlan:
        count = min(len(rates), step.room)
        return DraftPlan(tuple(range(count)), min(most, step.room // count) if count else 0, 1.0)

    monkeypatch.setattr(model_planning, "plan_model_drafts", every)
    monkeypatch.setattr(model_planning, "is_worth_computing", lambda *_: True)


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch, make: MakeEngine, model_path: Path, eager: None) -> MakeEngine:
    """Engines that draft with the model itself, and never look tokens up."""
    monkeypatch.setattr(Speculator, "_chosen", lambda *_: {})
    monkeypatch.setattr("workers.engine.speculation.drafting.Balance.may_draft", lambda *_: True)
    options = {"slots": 1, "context": 1024, "speculation": "auto", "vectors": False}
    return lambda *path, **more: make(*path, **options | {"draft": DraftFile(path=model_path, most=6)} | more)


def ask(prompt: str = PROMPT, tokens: int = 20, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=tokens, **{"sampling": GREEDY} | more)


def drafts_of(engine: LlamaEngine) -> ModelDrafts:
    found = engine._loop.speculator.model_drafts
    assert found is not None
    return found


def require_in_step(engine: LlamaEngine) -> None:
    """The draft model's cache holds what is known of it."""
    drafts = drafts_of(engine)
    assert drafts._context is not None
    for slot in drafts._slots:
        assert drafts._context.positions(slot.number)[1] + 1 == len(slot.tokens)


def test_the_same_text_as_without(drafting: MakeEngine) -> None:
    """Also with random numbers, of which most drafts are wrong, and with a next text that shares its beginning."""
    engine, plain = drafting(), drafting(draft=None, speculation="off")
    requests = [
        ask(),
        ask(sampling=Sampling(temperature=1.0, top_k=40, seed=5)),
        ask(PROMPT + ", there lived a", 17),
    ]
    for request in requests:
        texts = [each.generate(request).result(60) for each in (engine, plain)]
        assert (texts[0].text, texts[0].finish) == (texts[1].text, texts[1].finish)
        require_in_step(engine)
    drafts = drafts_of(engine)
    figures = engine.metrics()
    assert 20 < drafts.accepted < drafts.drafted == figures.tokens_drafted


def test_texts_together_that_come_and_go(drafting: MakeEngine, model_path: Path) -> None:
    """A text that is cancelled, one that is parked, and a context that is rebuilt in between."""
    engine = drafting(slots=2, context=2048, park_progress=1)
    started = threading.Event()
    endless = ask("A list of numbers: 1, 2,", 800, sampling=Sampling(temperature=0, ignore_end=True))
    cancelled = engine.generate(endless, lambda _: started.set())
    batch = engine.generate(ask(PROMPT, 28, priority=PriorityClass.BATCH))
    assert started.wait(60)
    urgent = engine.generate(ask("The capital of France is", 24, priority=PriorityClass.INTERACTIVE))
    texts = {"The capital of France is": urgent.result(60).text}
    cancelled.cancel()
    with pytest.raises(CancelledError):
        cancelled.result(60)
    texts[PROMPT] = batch.result(60).text
    assert engine.metrics().parked

    before = drafts_of(engine)._context
    engine._loop.context.decode = lambda _: -3  # type: ignore[method-assign] # until the context is rebuilt
    texts["Red, green and"] = engine.generate(ask("Red, green and", 24)).result(60).text
    assert engine.metrics().rebuilt == 1
    after = drafts_of(engine)._context
    assert before is not None
    assert after is not None
    assert after is not before
    assert after.threads is before.threads, "their number was chosen by measurement"
    assert drafts_of(engine).accepted > 20
    require_in_step(engine)
    gaps = Gaps(model_path, list(texts))
    try:
        assert max(gaps.largest(prompt, text) for prompt, text in texts.items()) < NOISE
    finally:
        gaps.llama.close()


def test_faults_of_the_draft_model_fail_no_text(drafting: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plain = drafting(), drafting(draft=None, speculation="off")
    drafts = drafts_of(engine)
    assert drafts._context is not None
    monkeypatch.setattr(drafts._context, "decode", lambda _: -3)
    texts = [each.generate(ask()).result(60).text for each in (engine, plain)]
    assert texts[0] == texts[1]
    assert not drafts.is_on


@pytest.fixture
def drafts(eager: None, tiny_llama: Path) -> Iterator[ModelDrafts]:
    """Drafts for four texts, with a small batch."""
    options = EngineOptions(slots=4, context=128, layout="streams", batch=32, vectors=False, threads=1)
    made = ModelDrafts(LlamaModel(tiny_llama, options), options, 4, 0.1)
    yield made
    made.close()


def planned(drafts: ModelDrafts, tasks: Sequence[EngineTask]) -> dict[int, list[int]]:
    return drafts.plan(tasks, tasks, Step(len(tasks), 1.0, 16, lambda count: 0.05 * count), Balance())


def running(number: int, tokens: int) -> EngineTask:
    """A text of so many tokens that runs in the sequence of this number."""
    request = GenerateRequest(prompt="-", max_tokens=20)
    task = EngineTask(number, request, tuple(range(100, 100 + tokens)), (), None, 0, None, None)
    task.work = BatchWork(number, number, 1, number, 1, decoding=True)
    return task


def test_texts_that_miss_more_tokens_than_a_batch_draft_one_after_the_other(drafts: ModelDrafts) -> None:
    tasks = [running(number, 12) for number in range(4)]
    assert [sorted(planned(drafts, tasks)) for _ in range(2)] == [[0, 1], [0, 1, 2, 3]]


def test_a_draft_model_that_ends_with_the_part_of_a_prompt_drafts_nothing(
    drafts: ModelDrafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drafts._context is not None
    monkeypatch.setattr(drafts._context, "decode", lambda _: -3)
    tasks = [running(0, 30), running(1, 3)]
    assert planned(drafts, tasks) == {}  # a part of the long text fails, and a draft for the short one
    assert drafts.is_on
    assert planned(drafts, tasks) == {}
    assert not drafts.is_on


def test_the_time_of_the_draft_model_counts_as_time_of_decodes(
    drafting: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tokens that were accepted count."""
    engine = drafting()
    main, meter = engine._loop.context, engine._loop.meter
    real, verified = Context.decode, meter.verified
    # Seconds: of all decodes; since the last decode of the model; of the steps with drafts; of these as counted.
    spent, step, drafted, counted = 0.0, 0.0, 0.0, 0.0

    def decode(context: Context, pieces: Any) -> int:
        nonlocal spent, step, drafted
        began = perf_counter()
        code = real(context, pieces)
        seconds = perf_counter() - began
        spent, step = spent + seconds, step + seconds
        if context is main:
            drafted += step * any(outputs > 1 for *_, outputs in pieces)
            step = 0.0
        return code

    def record(drafts: int, accepted: int, seconds: float) -> None:
        nonlocal counted
        counted += seconds
        verified(drafts, accepted, seconds)

    monkeypatch.setattr(Context, "decode", decode)
    monkeypatch.setattr(meter, "verified", record)
    engine.generate(ask()).result(60)
    assert engine.metrics().decode_seconds >= spent
    assert counted >= drafted > 0


def test_another_vocabulary_is_refused(drafting: MakeEngine, gemma_path: Path, model_path: Path) -> None:
    why = rf"{gemma_path.name}.* cannot be the draft model of {model_path.name}: its tokenizer is of the type llama"
    with pytest.raises(ModelUnsupported, match=why):
        drafting(draft=DraftFile(path=gemma_path))


@pytest.mark.parametrize(
    ("main", "draft", "why"),
    [
        ("model_path", "tiny_bert", "it computes vectors and writes no text"),
        ("model_path", "tiny_mamba", "it is recurrent"),
        ("tiny_llama", "model_path", "its weights have .* bytes, more than the"),
        ("tiny_mamba", "tiny_llama", "whose state cannot be truncated, because it is recurrent"),
    ],
)
def test_a_model_that_cannot_draft_is_refused(
    request: pytest.FixtureRequest, drafting: MakeEngine, main: str, draft: str, why: str
) -> None:
    found = request.getfixturevalue(draft)
    path = found(PoolingType.MEAN) if callable(found) else found
    with pytest.raises(ModelUnsupported, match=why) as caught:
        drafting(request.getfixturevalue(main), draft=DraftFile(path=path))
    assert path.name in str(caught.value)
    assert "accepted is" in str(caught.value)


def step(base: float = 1.0, more: float = 0.05) -> Step:
    return Step(1, base, 16, lambda count: more * count)


def test_the_plan_follows_rates_and_costs() -> None:
    """By the size of the draft model before it is measured, then by its measured decodes, then by its size again."""
    costs = DraftCosts(0.1)
    assert model_planning.plan_model_drafts([0.9], 1, 8, step(), costs).depth == 8
    assert 0 < model_planning.plan_model_drafts([0.4], 1, 8, step(), costs).depth < 4
    assert not model_planning.plan_model_drafts([0.1], 1, 8, step(), costs).chosen
    assert model_planning.plan_model_drafts([0.1, 0.9], 2, 8, step(), costs).chosen == (1,)
    assert not model_planning.plan_model_drafts([1.0], 1, 8, step(), DraftCosts(1.0)).chosen
    for _ in range(4):
        costs.record(1, 1.2)
    assert not model_planning.plan_model_drafts([0.9], 1, 8, step(), costs).chosen
    for _ in range(20_000):
        costs.rest()
    assert model_planning.plan_model_drafts([0.9], 1, 8, step(), costs).chosen


def test_a_lasting_change_of_the_cost_of_a_draft_is_followed() -> None:
    """One slow decode may have waited for a core; many of them are what it costs now."""
    costs = DraftCosts(0.1)
    assert [costs.record(1, 0.1) for _ in range(9)] == [0.1] * 9
    assert costs.record(1, 0.5) == 0.1
    for _ in range(9):
        costs.record(1, 0.5)
    assert costs.record(1, 0.5) == costs.seconds(1, 1, 1.0) == 0.5


def test_a_prompt_is_computed_only_for_texts_that_will_gain() -> None:
    worth = model_planning.is_worth_computing
    assert worth(100, 50, 500, 1.0, step(), 0.1)
    assert not worth(1000, 50, 500, 1.0, step(), 0.1)
    assert not worth(100, 50, 4, 1.0, step(), 0.1)
    assert not worth(100, 50, 500, 0.0, step(), 0.1)


def test_rates_are_learned_and_forgotten() -> None:
    engine = DraftRate()
    text = DraftRate(engine)
    for _ in range(20):
        text.record(8, 0)
    assert text.value < 0.1
    assert text.value < engine.value < 0.3
    for _ in range(3000):
        text.rest()
    assert text.value == pytest.approx(engine.value, rel=0.05)
