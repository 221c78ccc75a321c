"""
Random histories of the real loop on a model of the KV cache, cell by cell.

The fake model's next token is a function of all tokens in the cells of the sequence. So a text that equals the one
written alone proves that no token was lost, repeated or read from another sequence, whatever was admitted, finished,
cancelled, parked, evicted or failed meanwhile.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.inference.requests import GenerateRequest, PriorityClass, Sampling
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import loop as loop_module
from workers.engine.bindings.llama import decode_threads
from workers.engine.kv_store.store import PrefixStore, StoreLimits
from workers.engine.options import EngineOptions, KvLayout
from workers.engine.speculation import model_drafts, model_planning
from workers.engine.speculation.draft_model import draft_options
from workers.engine.speculation.model_drafts import ModelDrafts
from workers.engine.speculation.model_planning import DraftCosts, DraftPlan, Step
from workers.engine.speculation.speculator import Speculator
from workers.engine.tasks import EngineTask

VOCABULARY = 50
END = 7
GREEDY = Sampling(temperature=0)


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def alone(prompt: Sequence[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == END:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


class FakeModel:
    path = Path("fake.gguf")
    n_vocab = VOCABULARY
    end_tokens = frozenset({END})
    recurrent = False
    window = 0
    n_context_trained = 0
    forbidden_tokens: ClassVar[Any] = np.array([], np.intp)

    def piece(self, token: int) -> bytes:
        return bytes([0x30 + token])

    def close(self) -> None:
        pass


class FakeContext:
    """A KV cache that numbers its cells and fails on input on which llama.cpp would abort."""

    #: Codes that the next decodes return instead of decoding.
    faults: ClassVar[list[int]] = []

    def __init__(self, model: FakeModel, options: EngineOptions) -> None:
        self.options = options
        self.model = model
        self.pointer = object()
        self.n_context = options.context
        self.n_sequence = options.context // options.slots if options.streams else options.context
        self.n_batch = options.batch
        self.computes_apart = not options.streams
        self.threads = decode_threads(options)
        self.cells: dict[int, list[int]] = {sequence: [] for sequence in range(options.sequences)}
        self.contents: dict[int, int] = {}
        self.numbers = 0
        self.rows: list[int] = []

    def used(self) -> int:
        return len({cell for chain in self.cells.values() for cell in chain}) if not self.options.streams else 0

    def text(self, sequence: int) -> list[int]:
        return [self.contents[cell] for cell in self.cells[sequence]]

    def _new(self, token: int) -> int:
        self.numbers += 1
        self.contents[self.numbers] = token
        return self.numbers

    def decode(self, pieces: Sequence[tuple[int, int, Sequence[int], int]]) -> int:
        assert sum(len(part) for _, _, part, _ in pieces) <= self.n_batch
        assert len({sequence for sequence, *_ in pieces}) == len(pieces), "a sequence twice in a batch"
        if FakeContext.faults:
            return FakeContext.faults.pop()
        self.rows = []
        assert sum(outputs for *_, outputs in pieces) <= self.options.outputs
        for sequence, first, part, outputs in pieces:
            assert first == len(self.cells[sequence]), "a token lost or repeated"
            self.cells[sequence] += [self._new(token) for token in part]
            assert len(self.cells[sequence]) <= self.n_sequence
            text = self.text(sequence)
            self.rows += [next_token(text[:end]) for end in range(len(text) - outputs + 1, len(text) + 1)]
        assert self.used() <= self.n_context, "the cache overflows"
        return 0

    def logits(self, rows: int) -> Any:
        assert rows == len(self.rows)
        logits = np.zeros((rows, VOCABULARY), np.float32)
        logits[np.arange(rows), self.rows] = 1
        return logits

    def copy(self, source: int, target: int, count: int) -> bool:
        assert not self.cells[target]
        assert source != target
        if self.options.streams:
            self.cells[target] = [self._new(token) for token in self.text(source)[:count]]
        else:
            self.cells[target] = self.cells[source][:count]
        return len(self.cells[target]) == count

    def truncate(self, sequence: int, count: int) -> bool:
        del self.cells[sequence][count:]
        return True

    def drop(self, sequence: int) -> bool:
        self.cells[sequence] = []
        return True

    def save(self, sequence: int) -> Any:
        return np.array(self.text(sequence), np.uint8)

    def state_bytes(self, sequence: int) -> int:
        return len(self.cells[sequence])

    def positions(self, sequence: int) -> tuple[int, int]:
        return min(0, len(self.cells[sequence]) - 1), len(self.cells[sequence]) - 1

    def restore(self, sequence: int, data: Any, count: int, last: int | None = None) -> bool:
        assert not self.cells[sequence]
        assert len(data) == count
        assert last in (None, count - 1)
        self.cells[sequence] = [self._new(int(token)) for token in data]
        return True

    def use_loras(self, adapters: Any) -> None:
        pass

    def close(self) -> None:
        pass


class Histories(RuleBasedStateMachine):
    """The loop runs in this thread, one iteration at a time."""

    streams = False
    reproducible = False
    #: The most bytes, which are cells, of prefixes that left the cache.
    stored = 0
    drafts = False

    @initialize()
    def begin(self) -> None:
        FakeContext.faults = []
        options = EngineOptions(
            slots=3,
            context=256,
            batch=32,
            kept=3,
            park_bytes=90,
            park_progress=2,
            layout=KvLayout.STREAMS if self.streams else KvLayout.UNIFIED,
            reproducible=self.reproducible,
            speculation="auto" if self.drafts else "off",
        )
        store = PrefixStore(StoreLimits(self.stored, self.stored + 90, 9.0)) if self.stored else None
        self.loop = loop_module.EngineLoop(FakeModel(), options, store)  # type: ignore[arg-type] # it has what the loop reads of a model
        self.tasks: list[EngineTask] = []
        self.faulted = False

    @rule(
        start=st.sampled_from([(1, 2, 3) * 15, (1, 2) * 4, (9,) * 40, ()]),
        rest=st.lists(st.integers(0, 20), min_size=1, max_size=12),
        max_tokens=st.integers(1, 25),
        priority=st.sampled_from(PriorityClass),
    )
    def ask(self, start: tuple[int, ...], rest: list[int], max_tokens: int, priority: PriorityClass) -> None:
        request = GenerateRequest(prompt="x", max_tokens=max_tokens, sampling=GREEDY, priority=priority)
        prompt = (*start, *rest)
        if len(prompt) + max_tokens > self.loop.context.n_sequence:
            return
        task = EngineTask(len(self.tasks) + 1, request, prompt, (), None, 0, None, None)
        if self.loop.fatal_reason is not None:
            with pytest.raises(StepFailure, match="given up"):
                self.loop.submit([task])
            return
        self.tasks.append(task)
        self.loop.submit([task])

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.tasks)).cancelled = True
        self.loop.wake()

    @rule(code=st.sampled_from([-1, 1, 2, -3]))
    def fault(self, code: int) -> None:
        FakeContext.faults = [code]
        self.faulted = True

    @rule(iterations=st.integers(1, 12))
    def work(self, iterations: int) -> None:
        for _ in range(iterations):
            if self.loop._inbox or self.loop._waiting or self.loop.slots.running:
                assert self.loop._wait_for_work()
                self.loop._iterate()

    @invariant()
    def slots_are_exclusive_and_the_accounting_is_exact(self) -> None:
        loop = getattr(self, "loop", None)
        if loop is None:
            return
        slots, context = loop.slots, loop.context
        assert len(slots.running) <= loop.options.slots
        owners = [task.work.sequence for task in slots.running.values() if task.work]
        assert sorted(owners) == sorted(slots.running)
        if not loop.options.streams:
            assert slots.cells.used == context.used()
            assert slots.cells.used + slots.cells.reserved_unused() <= context.n_context
        for sequence, task in slots.running.items():
            assert context.text(sequence) == task.tokens[: task.computed]
        for sequence in slots.index.kept:
            assert tuple(context.text(sequence)) == slots.index.tokens(sequence)
        held = set(slots.running) | set(slots.index.kept) | slots._free
        assert held == set(range(loop.options.sequences))

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        FakeContext.faults = []
        iterations = 0
        while self.loop._inbox or self.loop._waiting or self.loop.slots.running:
            assert self.loop._wait_for_work()
            self.loop._iterate()
            iterations += 1
            assert iterations < 5000, "a task starves"
        for task in self.tasks:
            self.check(task)

    def check(self, task: EngineTask) -> None:
        assert task.future.done()
        error = task.future.exception()
        if isinstance(error, CancelledError):
            assert task.cancelled
        elif error is not None:
            assert self.faulted
            assert isinstance(error, StepFailure)
            assert error.reason is FailureReason.ENGINE_ERROR
        else:
            expected = alone(task.prompt, task.request.max_tokens)
            result = task.future.result()
            assert [byte - 0x30 for byte in result.text.encode("latin-1")] == expected
            assert result.tokens_out == len(expected)


class StreamHistories(Histories):
    streams = True


class ReproducibleHistories(Histories):
    reproducible = True


class StoredHistories(Histories):
    stored = 150


class StoredStreamHistories(StoredHistories):
    streams = True


class Drafts(Speculator):
    """Drafts whatever it costs, of changing lengths. The first tokens of a draft are right, the others need not be."""

    def _chosen(self, tasks: Sequence[EngineTask], room: int) -> dict[int, list[int]]:
        found = {}
        for task in tasks:
            chance = zlib.crc32(bytes(task.tokens[::-1]))
            size = min(chance % 7, room, task.request.max_tokens - task.written - 1)
            tokens = list(task.tokens)
            for place in range(size):
                tokens.append(next_token(tokens) if place < chance // 7 % 7 else chance // 49 % VOCABULARY)
            if size > 0 and task.work is not None:
                found[task.work.sequence] = tokens[-size:]
                room -= size
        return found


class DraftHistories(Histories):
    drafts = True


class DraftStreamHistories(Histories):
    drafts = True
    streams = True


class FakeDraftContext(FakeContext):
    """The cache of a draft model whose tokens are often those of the model, and often not."""

    def logits(self, rows: int) -> Any:
        logits = super().logits(rows)
        for row, token in enumerate(self.rows):
            logits[row, (token * 7 + 3) % VOCABULARY] += 2.0 * (token % 3 == 0)
        return logits


def some(rates: Sequence[float], missing: int, most: int, step: Step, costs: DraftCosts) -> DraftPlan:
    """A plan that changes with the tokens that are missing, and leaves texts out."""
    count = min(len(rates), step.room, missing % 4)
    return DraftPlan(tuple(range(count)), min(1 + missing % 6, step.room // count), 1.0) if count else DraftPlan()


class ModelDraftHistories(Histories):
    """Drafts of a draft model, beside looked-up ones."""

    drafts = True

    @initialize()
    def begin(self) -> None:
        super().begin()
        options = draft_options(self.loop.options)
        drafts = ModelDrafts(FakeModel(), options, 6, 0.1)  # type: ignore[arg-type] # it has what they read of a model
        speculator = self.loop.speculator
        speculator.model_drafts = drafts
        for owner, name, value in (
            (speculator._costs, "known", 1.0),
            (speculator._costs, "more", 0.0),
            (speculator._balance, "may_draft", True),
        ):
            setattr(owner, name, lambda *_, value=value: value)

    @invariant()
    def the_draft_model_is_in_step(self) -> None:
        drafts = getattr(getattr(self, "loop", None), "speculator", None) and self.loop.speculator.model_drafts
        if drafts and drafts.is_on:
            for slot in drafts._slots:
                assert drafts._context.text(slot.number) == slot.tokens
            assert len({text.slot.number for text in drafts._texts.values()}) == len(drafts._texts)


PLAIN = (Histories, StreamHistories, ReproducibleHistories)
DRAFTS = (DraftHistories, DraftStreamHistories, ModelDraftHistories)
for machine in (*PLAIN, StoredHistories, StoredStreamHistories, *DRAFTS):
    machine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)

TestHistories = Histories.TestCase
TestStreamHistories = StreamHistories.TestCase
TestReproducibleHistories = ReproducibleHistories.TestCase
TestStoredHistories = StoredHistories.TestCase
TestStoredStreamHistories = StoredStreamHistories.TestCase
TestDraftHistories = DraftHistories.TestCase
TestDraftStreamHistories = DraftStreamHistories.TestCase
TestModelDraftHistories = ModelDraftHistories.TestCase


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "Context", FakeContext)
    monkeypatch.setattr(model_drafts, "Context", FakeDraftContext)
    monkeypatch.setattr(model_planning, "plan_model_drafts", some)
    monkeypatch.setattr(model_planning, "is_worth_computing", lambda *_: True)
    monkeypatch.setattr(loop_module, "Speculator", Drafts)
