"""
Batch planning: the content of the next decode, and the next admission. Pure functions that the loop carries out.

Every running text gets one token in every decode, except for those of the class `batch` while an interactive request
runs: they stand still, and take part in one decode of `BATCH_EVERY`. Prompts fill the rest. While a latency-sensitive
text is written, they have a share of the step that follows from what the step takes without them (`prefill_seconds`).
Otherwise prompts fill the whole batch, because texts that are decoded together from beginning to end are written
fastest; those of the class `batch` never do, so that an interactive request that arrives waits for a short decode.
Of the prompts of a class, a short one overtakes a long one, unless that has waited longer by more than three times the
difference of the times that they take.
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
from math import sqrt

#: Two of the ranks of app.inference.requests: the smaller one goes first.
INTERACTIVE, STANDARD, BATCH = 0, 1, 2

#: While an interactive request runs, one of the class `batch` takes part in a decode after it was skipped so often. It
#: goes on slowly then, and each interactive token is later by a small part.
BATCH_EVERY = 64
#: The weight of a second of waiting, by rank.
_WEIGHTS = (6.0, 1.0, 0.3)
#: Seconds. Prompts add the geometric mean of this and of the time that the texts take to a step: see `prefill_seconds`.
_PREFILL_SCALE = 10.0
#: The least part of the prompts that wait, by time, in a step, as long as that makes it take no more than a part of the
#: time of a step with a full batch.
_BACKLOG_SHARE, _FULL_SHARE = 0.5, 1 / 3
#: llama.cpp's attention on CPUs computes tiles of so many rows. A part of a tile takes as long as a whole one, fewer
#: tokens than one are computed row by row, which takes a fifth longer in all.
TILE = 64
#: Prompt tokens from which on they are decoded apart from texts, where that is faster: each tile visits the cells of
#: all sequences that have a row in it.
APART_TOKENS = 48
#: A prompt counts as submitted later by so many times the seconds that it takes, so short ones overtake long ones.
_LENGTH_FACTOR = 3.0
#: Seconds that prompts of the class `batch` may add to a step: an interactive request that arrives waits for its end.
BATCH_LATENCY = 0.02
#: Minimum of prompt tokens in a step, however slow the machine is.
MIN_PREFILL_TOKENS = 16
#: Until the speed of the machine is known: prompt tokens in a step, and the seconds that it is expected to take.
_FIRST_PREFILL, _FIRST_SECONDS = 256, 0.2
#: The part of the tokens of `BATCH_LATENCY` that such a decode has.
_BATCH_SHARE = 4
#: A prompt that was skipped in this many decodes goes first, whatever its class.
STARVED = 64
#: More tokens than any prompt has.
MAX_TOKENS = 2**31


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
    adjacent: int = MAX_TOKENS
    #: Seconds, on the caller's clock, at which the request was submitted.
    submitted: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one request in a decode."""

    work: BatchWork
    count: int
    #: The chunk holds the last known token, so the next token is chosen from this decode.
    is_last: bool

    @property
    def is_text(self) -> bool:
        """Whether it is the next token of a text, rather than a part of a prompt."""
        return self.work.decoding and self.count == 1


@dataclass(frozen=True, slots=True)
class StepPace:
    """How fast the machine is, as measured, and how long prompts may make a step."""

    #: Prompt tokens per second, and output tokens per second; 0 while it is not known.
    prefill_rate: float = 0.0
    decode_rate: float = 0.0
    #: Seconds that prompts may add to a step while a latency-sensitive text is written; None follows both aims.
    step_latency: float | None = None
    #: The part of the prompt tokens that a step has while a latency-sensitive text is written, as they are slower now.
    prompt_part: float = 1.0

    def tokens(self, seconds: float) -> int:
        """Prompt tokens that take `seconds`; never fewer than `MIN_PREFILL_TOKENS`."""
        rate = self.prefill_rate or _FIRST_PREFILL / (self.step_latency or _FIRST_SECONDS)
        return max(MIN_PREFILL_TOKENS, int(rate * seconds * self.prompt_part))

    def text_seconds(self, texts: int) -> float:
        """Seconds of a decode of one token for each of so many texts."""
        rate = self.decode_rate or self.prefill_rate
        return texts / rate if rate else _FIRST_SECONDS


def plan_decode(works: Sequence[BatchWork], batch_tokens: int, pace: StepPace, *, apart: bool = False) -> list[Chunk]:
    """
    Plan the next decode. The result is ordered by sequence, because llama.cpp computes neighbours together.

    `batch_tokens` must be at least the number of works. `apart`: see `decodes_of`.
    """
    chunks, prompts = [], []
    batch_room = pace.tokens(min(BATCH_LATENCY, pace.step_latency or BATCH_LATENCY))
    if any(work.rank == INTERACTIVE for work in works):
        works = [work for work in works if work.rank != BATCH or work.skipped >= BATCH_EVERY]
        batch_room = max(1, batch_room // _BATCH_SHARE)
    for work in works:
        if work.decoding and work.remaining == 1:
            chunks.append(Chunk(work, 1, is_last=True))
        else:
            prompts.append(work)
    if prompts:
        room = batch_tokens - len(chunks)
        texts = [chunk.work for chunk in chunks]
        room = min(room, prefill_tokens(texts, prompts, batch_tokens, pace, apart=apart))
        rate = pace.prefill_rate or _FIRST_PREFILL
        prompts.sort(
            key=lambda work: (
                work.skipped < STARVED,
                work.rank,
                work.submitted + _LENGTH_FACTOR * work.remaining / rate,
                work.order,
            )
        )
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


def prefill_tokens(
    texts: Sequence[BatchWork], prompts: Sequence[BatchWork], batch_tokens: int, pace: StepPace, *, apart: bool = False
) -> int:
    """
    Return the most prompt tokens of a step beside these texts, of which each gets a token.

    They are whole tiles, unless `step_latency` is set or they would be less than half of one. Where texts and prompts
    are in one decode, llama.cpp computes the first token of the prompt together with the texts, so it is one more.
    """
    readers = [work.rank for work in texts if work.latency_sensitive]
    if not readers or not prompts:
        return MAX_TOKENS
    if pace.step_latency is not None:
        return pace.tokens(pace.step_latency)
    rank = min(work.rank for work in prompts)
    ahead = sum(work.remaining for work in prompts if work.rank == rank)
    backlog, full = (tokens / pace.prefill_rate if pace.prefill_rate else 0.0 for tokens in (ahead, batch_tokens))
    tokens = pace.tokens(prefill_seconds(pace.text_seconds(len(texts)), backlog, full, rank, min(readers)))
    tiles = round(tokens / TILE)
    return tiles * TILE + (not apart) if tiles else tokens


def prefill_seconds(texts: float, backlog: float, full: float, prompt_rank: int, reader_rank: int) -> float:
    """
    Return the seconds that prompts add to a step which takes `texts` seconds for the texts alone.

    With s seconds in each step, a prompt of P seconds is computed after P + P / s * texts, and its steps are s + texts
    long. A first token that is late counts by the time, a gap between tokens by its square, as long gaps disturb more
    than many short ones. The weighted sum is least where s is the root of texts * scale * (weight of the prompt /
    weight of the reader). So the share follows the speed of the machine, without a value at which it changes abruptly.

    `backlog` is the seconds that all these prompts take, `full` those of a batch full of prompts. Where prompts take
    nearly all of the time, short steps would have every request wait for its prompt. So a step has a part of the
    backlog at the least, but takes a third of the time of a step with a full batch at the most then.
    """
    weight = _WEIGHTS[prompt_rank] / _WEIGHTS[reader_rank]
    most = _FULL_SHARE * (full + texts) - texts
    return max(sqrt(texts * _PREFILL_SCALE * weight), min(backlog * _BACKLOG_SHARE * min(1.0, weight), most))


def decodes_of(chunks: list[Chunk], *, apart: bool) -> list[list[Chunk]]:
    """
    Divide the chunks of a step into decodes: all together, or texts and prompts one after the other.

    `apart` says that long prompts and texts are computed faster one after the other: see `APART_TOKENS`.
    """
    if not apart:
        return [chunks]
    texts = [chunk for chunk in chunks if chunk.is_text]
    prompts = [chunk for chunk in chunks if not chunk.is_text]
    if not texts or sum(chunk.count for chunk in prompts) < APART_TOKENS:
        return [chunks]
    return [texts, prompts]


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
