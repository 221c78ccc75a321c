"""
Batches: what the next decode holds, and who comes in next. Pure functions; the loop does what they say.

Every running text gets its token in every decode. Prompts fill what is left, at most `prefill_tokens` while somebody
waits for each token, so that a long prompt adds a bounded time to each step. Where all wait for whole texts, prompts
come first: texts that are written side by side from their beginning to their end are written fastest.
Who comes in is decided one at a time: by class, then by age; waiting raises a request's class, so nobody starves.
Nobody overtakes a request that waits for room; a request that waits for a prefix which is being computed stands aside.
An interactive request parks the least advanced batch request when it finds no slot or no cells.
A request comes in only when all the cells that it can come to need are free: a decode never lacks cells.

Time enters as seconds waited. Nothing here knows tokens' values, llama.cpp or threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: The ranks of app.inference.requests, spelled out: smaller goes first.
INTERACTIVE, BATCH = 0, 2

#: A prompt that was left out of this many decodes goes first, whatever its class.
STARVED = 64


@dataclass(slots=True)
class BatchWork:
    """A request in a slot, as the decode sees it."""

    id: int
    #: The sequence of the KV cache that it writes to.
    sequence: int
    rank: int
    #: Requests that came earlier have smaller numbers.
    order: int
    #: Tokens that are known and not yet computed. The last of them gives the next token.
    left: int
    #: The first token was given: one token is left in every step.
    writing: bool = False
    #: Somebody waits for each of its tokens.
    watched: bool = False
    #: Decodes since it had its part in one.
    waited: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one request in a decode."""

    work: BatchWork
    count: int
    #: These are all that is left: the next token is chosen from this decode.
    ends: bool


def plan_decode(works: Sequence[BatchWork], batch_tokens: int, prefill_tokens: int) -> list[Piece]:
    """
    What the next decode holds, ordered by sequence: llama.cpp computes neighbours together.

    `batch_tokens` is at least the number of works. The earliest prompt of the best class is computed first.
    """
    pieces, prompts, watched = [], [], False
    for work in works:
        if work.writing and work.left == 1:
            pieces.append(Piece(work, 1, ends=True))
            watched = watched or work.watched
        else:
            prompts.append(work)
    if prompts:
        room = batch_tokens - len(pieces)
        if watched:
            room = min(room, max(1, prefill_tokens))
        prompts.sort(key=lambda work: (work.waited < STARVED, work.rank, work.order))
        for work in prompts:
            if room <= 0:
                break
            count = min(work.left, room)
            pieces.append(Piece(work, count, ends=count == work.left))
            room -= count
    pieces.sort(key=lambda piece: piece.work.sequence)
    return pieces


def plan_alone(works: Sequence[BatchWork], batch_tokens: int) -> list[Piece]:
    """The reproducible decode: one request only, in chunks that depend on nothing but itself; all take turns."""
    if not works:
        return []
    work = max(works, key=lambda work: (work.waited, -work.order))
    count = min(work.left, batch_tokens)
    return [Piece(work, count, ends=count == work.left)]


def note_turns(works: Sequence[BatchWork], pieces: Sequence[Piece]) -> None:
    """Count the decodes that each work was left out of."""
    for work in works:
        work.waited += 1
    for piece in pieces:
        piece.work.waited = 0


def prefill_budget(rate: float, seconds: float, least: int, most: int) -> int:
    """Prompt tokens that add about `seconds` to a step, at `rate` tokens a second."""
    return max(least, min(most, int(rate * seconds)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that wants a slot."""

    id: int
    #: The class as it was asked for.
    rank: int
    #: Cells that it can come to hold, less those that it would share.
    cells: int
    #: A prefix of it is being computed: coming in later is cheaper.
    aside: bool = False


@dataclass(frozen=True, slots=True)
class Victim:
    """A running request that may be parked."""

    id: int
    #: Tokens computed and written so far.
    progress: int
    order: int
    #: Cells that come free with it, its unused promise too.
    cells: int


@dataclass(frozen=True, slots=True)
class BatchRoom:
    """What is there for the next request."""

    slots: int
    #: Cells that are free or held only by kept sequences.
    cells: int


@dataclass(frozen=True, slots=True)
class Admit:
    """Give the request a slot."""

    id: int


@dataclass(frozen=True, slots=True)
class Park:
    """Take the request's state out of the cache, so that another can come in."""

    id: int


def effective_rank(rank: int, waited: float, patience: float) -> int:
    """The class that a request has after `waited` seconds: one better for each `patience` seconds."""
    return max(INTERACTIVE, rank - int(waited / patience)) if patience > 0 else rank


def next_admission(candidates: Iterable[Candidate], victims: Sequence[Victim], room: BatchRoom) -> Admit | Park | None:
    """
    What to do next for the waiting requests, given best first: one step, or nothing.

    It is asked again after each step, with the new state. `candidates` is read no further than needed.
    """
    if room.slots <= 0 and not victims:
        return None
    for candidate in candidates:
        if candidate.aside:
            continue
        if room.slots > 0 and candidate.cells <= room.cells:
            return Admit(candidate.id)
        if candidate.rank != INTERACTIVE:
            return None
        if not victims or candidate.cells > room.cells + sum(victim.cells for victim in victims):
            return None
        return Park(min(victims, key=lambda victim: (victim.progress, -victim.order)).id)
    return None
