"""
Engine metrics: the counts and the current state of one engine, as one value for the pool's exporter.

Counts only rise. Durations are seconds. A snapshot may be taken from any thread; it may be one step old.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields

from workers.engine.batch import StepPace
from workers.engine.kv_store.figures import NO_STORE, StoreFigures

#: Upper bounds of the histogram buckets of queue waits, in seconds. One more bucket counts longer waits.
QUEUE_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

#: Weight of a new value in a moving average.
_BLEND = 1 / 8


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """The metrics of one engine since its start."""

    #: Requests that were accepted, and their outcomes; `refused` ones were not accepted.
    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    refused: int = 0
    #: Prompt tokens: submitted, computed, and reused from other requests.
    tokens_in: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    #: Output tokens.
    tokens_out: int = 0
    #: Draft tokens that were computed, and those of them that were the model's own choice.
    tokens_drafted: int = 0
    tokens_accepted: int = 0
    #: Those of them that a draft model predicted; the others were looked up.
    tokens_drafted_by_model: int = 0
    tokens_accepted_by_model: int = 0
    #: Requests that reused a prefix.
    prefix_hits: int = 0
    prefixes_evicted: int = 0
    parked: int = 0
    resumed: int = 0
    #: Decodes and their duration, with the planning of their drafts and the decodes of a draft model.
    decodes: int = 0
    decode_seconds: float = 0.0
    #: Time outside decodes: sampling, and all other work of the loop. Grammar time is part of sampling.
    sampling_seconds: float = 0.0
    bookkeeping_seconds: float = 0.0
    grammar_seconds: float = 0.0
    grammar_masks: int = 0
    grammar_compiled: int = 0
    #: Sum of the times from submission to a slot.
    queue_seconds: float = 0.0
    #: Histogram of these times, by the buckets of QUEUE_BOUNDS.
    queue_waits: tuple[int, ...] = (0,) * (len(QUEUE_BOUNDS) + 1)
    admitted: int = 0
    embedded_texts: int = 0
    embedded_tokens: int = 0
    #: Contexts that were rebuilt after a fault.
    rebuilt: int = 0
    #: The current state.
    slots: int = 0
    running: int = 0
    waiting: int = 0
    parked_now: int = 0
    parked_bytes: int = 0
    cells: int = 0
    cells_used: int = 0
    prefixes_kept: int = 0
    #: CPU threads of a decode of texts; 0 for an engine that uses none.
    threads: int = 0
    #: Those that left the cache.
    store: StoreFigures = NO_STORE
    #: Recent tokens per second, as moving averages: in decodes with prompts, and in decodes of output only.
    prefill_rate: float = 0.0
    decode_rate: float = 0.0

    @property
    def occupancy(self) -> float:
        """Fraction of the slots that are in use."""
        return self.running / self.slots if self.slots else 0.0


class Meter:
    """The mutable counts. Written by the engine's thread, except `submitted` and `refused`, which its lock guards."""

    def __init__(self) -> None:
        for field in fields(EngineMetrics):
            setattr(self, field.name, field.default)
        self._waits = [0] * (len(QUEUE_BOUNDS) + 1)

    submitted: int
    finished: int
    failed: int
    cancelled: int
    timed_out: int
    refused: int
    tokens_in: int
    tokens_computed: int
    tokens_reused: int
    tokens_out: int
    tokens_drafted: int
    tokens_accepted: int
    tokens_drafted_by_model: int
    tokens_accepted_by_model: int
    prefix_hits: int
    prefixes_evicted: int
    parked: int
    resumed: int
    decodes: int
    decode_seconds: float
    sampling_seconds: float
    bookkeeping_seconds: float
    grammar_seconds: float
    grammar_masks: int
    grammar_compiled: int
    queue_seconds: float
    admitted: int
    embedded_texts: int
    embedded_tokens: int
    rebuilt: int
    prefill_rate: float
    decode_rate: float

    def pace(self, step_latency: float | None, prompt_part: float = 1.0) -> StepPace:
        """Return the measured speeds, for the planning of a step."""
        return StepPace(self.prefill_rate, self.decode_rate, step_latency, prompt_part)

    def waited(self, seconds: float) -> None:
        """Record that a request got a slot after `seconds`."""
        self.admitted += 1
        self.queue_seconds += seconds
        self._waits[bisect_left(QUEUE_BOUNDS, seconds)] += 1

    def decoded(self, seconds: float, prompt: int, written: int) -> None:
        """Record a decode of `prompt` prompt tokens and `written` output tokens."""
        self.decodes += 1
        self.decode_seconds += seconds
        self.tokens_computed += prompt
        if seconds <= 0:
            return
        if prompt >= 16:
            self.prefill_rate = _blend(self.prefill_rate, (prompt + written) / seconds)
        elif written and not prompt:
            self.decode_rate = _blend(self.decode_rate, written / seconds)

    def note_grammar(self, seconds: float, masks: int) -> None:
        """Record the work of the grammar of a text that has ended."""
        self.grammar_seconds += seconds
        self.grammar_masks += masks

    def verified(self, drafted: int, accepted: int, seconds: float) -> None:
        """Record the draft tokens of a decode that was recorded before; `seconds` is 0 if it had a prompt."""
        self.tokens_drafted += drafted
        self.tokens_accepted += accepted
        if seconds > 0:
            self.decode_rate += accepted / seconds * _BLEND

    def snapshot(self, *, store: StoreFigures = NO_STORE, **now: float) -> EngineMetrics:
        """Return all counts together with the figures of the current state."""
        values = {field.name: getattr(self, field.name) for field in fields(EngineMetrics)}
        return EngineMetrics(**(values | {"queue_waits": tuple(self._waits), "store": store} | now))


def _blend(old: float, new: float) -> float:
    return new if not old else old + (new - old) * _BLEND
