"""
Batch planning: the content of the next decode, and the next admission. Pure functions that the loop carries out.

Every running text gets one token in every decode, except for those of the class `batch` while an interactive request
runs: they stand still, and take part in one decode of `BATCH_EVERY`. Prompts fill the rest: at most `prefill_tokens`
while a latency-sensitive request is running, so that a long prompt adds a bounded time to each step. Otherwise prompts
fill the whole batch, because texts that are decoded together from beginning to end are written fastest; those of the
class `batch` never do, so that an interactive request that arrives waits for a short decode.
Requests are admitted one at a time, by priority class, then by age. Waiting raises a request's class, so none starves;
the class `batch`, which is for idle slots, never rises above `standard`.
No request overtakes one that waits for room. A request whose prefix is being computed is deferred.
An interactive request parks the batch request with the least progress when it finds no slot or no cells.
A request is admitted only when all cells that it can need are free, so a decode never lacks cells.

Time is passed in as seconds waited. This module does not know token values, llama.cpp or threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Two of the ranks of app.inference.requests: the smaller one goes first.
INTERACTIVE, STANDARD, BATCH = 0, 1, 2

#: While an interactive request runs, one of the class `batch` takes part in a decode after it was skipped so often. It
#: goes on slowly then, and each interactive token is later by a small part.
BATCH_EVERY = 64
#: Seconds that prompts of the class `batch` may add to a step: an interactive request that arrives waits for its end.
BATCH_LATENCY = 0.02
#: Minimum of prompt tokens in a step, however slow the machine is.
MIN_PREFILL_TOKENS = 16
#: Prompt tokens in a step until the speed of the machine is known.
_FIRST_PREFILL = 256
#: The part of `batch_prefill_tokens` that such a decode has.
_BATCH_SHARE = 4
#: A prompt that was skipped in this many decodes goes first, whatever its class.
STARVED = 64
#: More tokens than any prompt has.
NO_IMAGE = 2**31


@dataclass(slots=True)
class BatchWork:
    """A running request, as the planning of a decode sees it."""

    id: int
    #: The sequence of the KV cache that it writes to.
    sequence: int
    rank: int
    #: Requests that came earlier have smaller numbers.
    order: int
    #: Tokens that are known and not yet computed. The logits of the last one choose the next token.
    remaining: int
    #: The prompt is computed and the text is in its decode phase: one token is left in every step.
    decoding: bool = False
    #: Each of its tokens is awaited.
    latency_sensitive: bool = False
    #: Decodes that skipped it since it was part of one.
    skipped: int = 0
    #: How many of the remaining tokens can be in one decode: those before the next image.
    adjacent: int = NO_IMAGE


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one request in a decode."""

    work: BatchWork
    count: int
    #: The chunk holds the last known token, so the next token is chosen from this decode.
    is_last: bool


def plan_decode(
    works: Sequence[BatchWork], batch_tokens: int, prefill_tokens: int, batch_prefill_tokens: int
) -> list[Chunk]:
    """
    Plan the next decode. The result is ordered by sequence, because llama.cpp computes neighbours together.

    `batch_tokens` must be at least the number of works. The oldest prompt of the best class is computed first.
    `batch_prefill_tokens` is the most tokens of prompts of the class `batch`.
    """
    chunks, prompts, latency_sensitive = [], [], False
    batch_room = batch_prefill_tokens
    if any(work.rank == INTERACTIVE for work in works):
        works = [work for work in works if work.rank != BATCH or work.skipped >= BATCH_EVERY]
        batch_room = max(1, batch_room // _BATCH_SHARE)
    for work in works:
        if work.decoding and work.remaining == 1:
            chunks.append(Chunk(work, 1, is_last=True))
            latency_sensitive = latency_sensitive or work.latency_sensitive
        else:
            prompts.append(work)
    if prompts:
        room = batch_tokens - len(chunks)
        if latency_sensitive:
            room = min(room, max(1, prefill_tokens))
        prompts.sort(key=lambda work: (work.skipped < STARVED, work.rank, work.order))
        for work in prompts:
            count = min(work.remaining, work.adjacent, room)
            if work.rank == BATCH:
                count = min(count, batch_room)
            if count <= 0:
                continue
            chunks.append(Chunk(work, count, is_last=count == work.remaining))
            room -= count
            batch_room -= count if work.rank == BATCH else 0
    chunks.sort(key=lambda chunk: chunk.work.sequence)
    return chunks


def plan_reproducible(works: Sequence[BatchWork], batch_tokens: int) -> list[Chunk]:
    """Plan a reproducible decode: one request, in chunks that depend on that request only. Requests take turns."""
    if not works:
        return []
    work = max(works, key=lambda work: (work.skipped, -work.order))
    count = min(work.remaining, work.adjacent, batch_tokens)
    return [Chunk(work, count, is_last=count == work.remaining)]


def count_skips(works: Sequence[BatchWork], chunks: Sequence[Chunk]) -> None:
    """Count the decodes that skipped each work."""
    for work in works:
        work.skipped += 1
    for chunk in chunks:
        chunk.work.skipped = 0


def prefill_budgets(rate: float, step_latency: float, most: int) -> tuple[int, int]:
    """
    Return the numbers of prompt tokens that may be in a step: of all classes, and of the class `batch`.

    The first adds about `step_latency` seconds to the step, at `rate` tokens per second; 0 means that it is not known.
    """
    rate = rate or _FIRST_PREFILL / max(step_latency, 0.01)
    batch_latency = min(BATCH_LATENCY, step_latency)
    budgets = (max(MIN_PREFILL_TOKENS, min(most, int(rate * seconds))) for seconds in (step_latency, batch_latency))
    return next(budgets), next(budgets)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A waiting request that may be admitted."""

    id: int
    #: The priority class of the request, not raised by waiting.
    rank: int
    #: The most KV cells that it can hold, less those that it would share.
    cells: int
    #: A prefix of it is being computed, so a later admission is cheaper.
    deferred: bool = False


@dataclass(frozen=True, slots=True)
class Victim:
    """A running request that may be parked."""

    id: int
    #: Tokens computed plus tokens written so far.
    progress: int
    order: int
    #: KV cells that parking it frees, its unused reservation included.
    cells: int


@dataclass(frozen=True, slots=True)
class FreeCapacity:
    """Free slots and cells for the next request."""

    slots: int
    #: KV cells that are free or held only by kept sequences.
    cells: int


@dataclass(frozen=True, slots=True)
class Admit:
    """Decision: give the request a slot."""

    id: int


@dataclass(frozen=True, slots=True)
class Park:
    """Decision: move the request's state out of the KV cache, so that another request can be admitted."""

    id: int


def effective_rank(rank: int, waited: float, patience: float) -> int:
    """
    Return the class of a request after `waited` seconds: one better for each `patience` seconds.

    One of the class `batch` never gets before an interactive one.
    """
    best = STANDARD if rank == BATCH else INTERACTIVE
    return max(best, rank - int(waited / patience)) if patience > 0 else rank


def next_admission(
    candidates: Iterable[Candidate], victims: Sequence[Victim], room: FreeCapacity
) -> Admit | Park | None:
    """
    Decide the next action for the waiting requests: admit one, park one, or nothing.

    The caller repeats the call after each action, with the new state. `candidates` come best first, and no more of them
    are read than needed.
    """
    if room.slots <= 0 and not victims:
        return None
    for candidate in candidates:
        if candidate.deferred:
            continue
        if room.slots > 0 and candidate.cells <= room.cells:
            return Admit(candidate.id)
        if candidate.rank != INTERACTIVE:
            return None
        if not victims or candidate.cells > room.cells + sum(victim.cells for victim in victims):
            return None
        return Park(min(victims, key=lambda victim: (victim.progress, -victim.order)).id)
    return None
