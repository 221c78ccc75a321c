"""
Metrics: what an engine did and how it stands, as one value for the pool's exporter.

Counts only rise. Durations are seconds. A snapshot is made on any thread; it may be one step old.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields

#: Seconds: the upper ends of the classes that waits are counted in; one more holds what is longer.
QUEUE_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """One engine, from its start until now."""

    #: Requests that were taken, and how they ended.
    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    refused: int = 0
    #: Tokens of prompts: asked for, computed, and taken over from earlier requests.
    tokens_in: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    #: Tokens written.
    tokens_out: int = 0
    #: Requests that took over a prefix.
    prefix_hits: int = 0
    prefixes_evicted: int = 0
    parked: int = 0
    resumed: int = 0
    #: Decodes, what they held, and the time they took.
    decodes: int = 0
    decode_seconds: float = 0.0
    #: Time outside decodes: choosing tokens, and all other work of the loop.
    sampling_seconds: float = 0.0
    bookkeeping_seconds: float = 0.0
    grammar_seconds: float = 0.0
    grammar_masks: int = 0
    grammar_compiled: int = 0
    #: From submission until a slot, over all requests that got one.
    queue_seconds: float = 0.0
    #: How many of them waited so long, by the classes of QUEUE_BOUNDS.
    queue_waits: tuple[int, ...] = (0,) * (len(QUEUE_BOUNDS) + 1)
    admitted: int = 0
    embedded_texts: int = 0
    embedded_tokens: int = 0
    #: Contexts that were made again after a fault.
    rebuilt: int = 0
    #: As it stands now.
    slots: int = 0
    running: int = 0
    waiting: int = 0
    parked_now: int = 0
    parked_bytes: int = 0
    cells: int = 0
    cells_used: int = 0
    prefixes_kept: int = 0
    #: Tokens a second of late: of prompts in steps that compute them, and written.
    prefill_rate: float = 0.0
    decode_rate: float = 0.0

    @property
    def occupancy(self) -> float:
        """Part of the slots that work."""
        return self.running / self.slots if self.slots else 0.0


class Meter:
    """The counts while they grow. Written by the engine's thread; `submitted` and `refused` under its lock."""

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

    def waited(self, seconds: float) -> None:
        """A request got a slot after so long."""
        self.admitted += 1
        self.queue_seconds += seconds
        self._waits[bisect_left(QUEUE_BOUNDS, seconds)] += 1

    def decoded(self, seconds: float, prompt: int, written: int) -> None:
        """A decode took `seconds` for so many prompt tokens and so many tokens of texts."""
        self.decodes += 1
        self.decode_seconds += seconds
        self.tokens_computed += prompt
        if seconds <= 0:
            return
        if prompt >= 16:
            self.prefill_rate = _blend(self.prefill_rate, (prompt + written) / seconds)
        elif written and not prompt:
            self.decode_rate = _blend(self.decode_rate, written / seconds)

    def snapshot(self, **now: float) -> EngineMetrics:
        """All counts, with the figures that stand now."""
        values = {field.name: getattr(self, field.name) for field in fields(EngineMetrics)}
        return EngineMetrics(**(values | {"queue_waits": tuple(self._waits)} | now))


def _blend(old: float, new: float) -> float:
    return new if not old else old + (new - old) / 8
