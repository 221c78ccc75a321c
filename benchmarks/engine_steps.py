"""
The planning of steps in simulated time, over machines of many speeds: `python -m benchmarks.engine_steps`.

`workers.engine.batch.plan_decode` as shipped, beside the rule of llama.cpp's server: a batch of 512 tokens, one for
each text, then prompts slot by slot. A decode takes a fixed time, a time for each text and one for each prompt token;
the speeds of decoding and of prompts are multiplied apart from 0.1 to 100. Prompts have 50 to 900 tokens, answers 8 to
96, on 8 slots: 8 requests under way (`closed`), or arrivals at a part of the capacity. Each cell is the engine's figure
over the server's; the last column is the engine's p99 of gaps in seconds.

`--tiles` has the times of one machine instead, where a part of a tile of prompt tokens takes nearly as
long as a whole one; `--length-factor` replaces the seconds by which a prompt counts as later for each that it takes.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil

from workers.engine import batch
from workers.engine.batch import TILE, BatchWork, Chunk, StepPace, count_skips, plan_decode

SLOTS, BATCH, STANDARD = 8, 512, 1
#: Seconds of a decode: fixed, for each text, and for each prompt token. Two slow cores with SmolLM2.
FIXED, TEXT, PROMPT = 0.004, 0.0025, 0.0022
SPEEDS = (0.1, 1.0, 10.0, 100.0)
#: The same with tiles: besides, seconds of a decode with prompts, and the part of a token's time that tiles take.
TILED = (0.003, 0.0065, 0.0031)
_PROMPTS, _TILED = 0.008, 0.08

Rule = Callable[[list[BatchWork], StepPace], list[Chunk]]


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds of a decode."""

    fixed: float
    text: float
    prompt: float

    def seconds(self, texts: int, prompts: int) -> float:
        """A decode of so many texts and prompt tokens."""
        return self.fixed + texts * self.text + prompts * self.prompt

    def pace(self) -> StepPace:
        """What the engine would have measured."""
        return StepPace(1 / self.prompt, SLOTS / (self.fixed + SLOTS * self.text))

    def capacity(self) -> float:
        """Requests per second, about."""
        return 1 / (475 * self.prompt + 52 * (self.text + self.fixed / 4))


class TiledMachine(Machine):
    """Two slow cores with SmolLM2, whose attention computes tiles of prompt tokens; texts are decoded apart."""

    def seconds(self, texts: int, prompts: int) -> float:
        """A decode with whole tiles costs `prompt` for each token, one of less than a tile a quarter more."""
        seconds = self.fixed + texts * self.text if texts else 0.0
        if prompts:
            tokens = prompts - bool(texts)  # the first one is computed with the texts
            tiled = (1 - _TILED) * prompts + _TILED * TILE * ceil(tokens / TILE)
            seconds += _PROMPTS + self.prompt * (prompts * 1.25 if tokens < TILE else tiled)
        return seconds


@dataclass(slots=True)
class Request:
    """A request, and when its tokens came."""

    arrives: float
    prompt: int
    answer: int
    times: list[float] = field(default_factory=list)


def engine(works: list[BatchWork], pace: StepPace) -> list[Chunk]:
    """The shipped rule."""
    chunks = plan_decode(works, BATCH, pace)
    count_skips(works, chunks)
    return chunks


def server(works: list[BatchWork], _: StepPace) -> list[Chunk]:
    """A token of each text, then prompts slot by slot."""
    chunks = [Chunk(work, 1, is_last=True) for work in works if work.decoding]
    room = BATCH - len(chunks)
    for work in sorted((work for work in works if not work.decoding), key=lambda work: work.sequence):
        if count := min(room, work.remaining):
            chunks.append(Chunk(work, count, is_last=count == work.remaining))
            room -= count
    return chunks


def simulate(rule: Rule, machine: Machine, requests: Sequence[Request], *, closed: bool) -> float:
    """Serve all requests; returns the seconds that it takes."""
    now, pace, waiting = 0.0, machine.pace(), list(enumerate(requests))
    running: dict[int, tuple[BatchWork, Request]] = {}
    while waiting or running:
        for slot in range(SLOTS):
            if slot not in running and waiting and (closed or waiting[0][1].arrives <= now):
                number, request = waiting.pop(0)
                request.arrives = now if closed else request.arrives
                work = BatchWork(number, slot, STANDARD, number, request.prompt, submitted=request.arrives)
                work.latency_sensitive = True
                running[slot] = work, request
        if not running:
            now = waiting[0][1].arrives
            continue
        chunks = rule([work for work, _ in running.values()], pace)
        texts = sum(chunk.work.decoding for chunk in chunks)
        prompts = sum(chunk.count for chunk in chunks if not chunk.work.decoding)
        now += machine.seconds(texts, prompts)
        for chunk in chunks:
            work, request = running[chunk.work.sequence]
            work.remaining -= chunk.count
            if chunk.is_last:
                request.times.append(now)
                work.remaining, work.decoding = 1, True
                if len(request.times) == request.answer:
                    del running[work.sequence]
    return now


def requests_of(seed: int, count: int, rate: float) -> list[Request]:
    """Random requests, by Poisson's law."""
    rng, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        found.append(Request(now, rng.randint(50, 900), rng.randint(8, 96)))
    return found


def figures(rule: Rule, machine: Machine, load: float | None, count: int, seed: int) -> dict[str, float]:
    """Figures of one run; `load` is the part of the capacity, None a closed loop."""
    requests = requests_of(seed, count, machine.capacity() * (load or 1))
    wall = simulate(rule, machine, requests, closed=load is None)
    first = sorted(request.times[0] - request.arrives for request in requests)
    gaps = sorted(b - a for request in requests for a, b in zip(request.times, request.times[1:], strict=False))
    return {
        "tokens/s": sum(request.answer for request in requests) / wall,
        "first p50": statistics.median(first),
        "first p99": first[round(0.99 * (len(first) - 1))],
        "gap p99": gaps[round(0.99 * (len(gaps) - 1))],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiles", action="store_true", help="one machine, whose prompts are computed in tiles")
    parser.add_argument("--length-factor", type=float, default=batch._LENGTH_FACTOR, metavar="N")
    asked = parser.parse_args()
    batch._LENGTH_FACTOR = asked.length_factor
    print(f"{'decode':>8} {'prefill':>8} {'load':>7}  tokens/s  first p50  first p99  gap p99   (engine, s)")
    for decode, prefill in [(1.0, 1.0)] if asked.tiles else product(SPEEDS, SPEEDS):
        machine = TiledMachine(*TILED) if asked.tiles else Machine(FIXED / decode, TEXT / decode, PROMPT / prefill)
        for load in (None, 0.6, 1.2):
            pairs = [
                [figures(rule, machine, load, asked.requests, seed) for rule in (engine, server)]
                for seed in range(1, asked.seeds + 1)
            ]
            ratio = {name: statistics.median(own[name] / other[name] for own, other in pairs) for name in pairs[0][0]}
            gap = statistics.median(own["gap p99"] for own, _ in pairs)
            shown = "closed" if load is None else f"{load:.0%}"
            print(
                f"{decode:>8g} {prefill:>8g} {shown:>7}  {ratio['tokens/s']:8.2f}  {ratio['first p50']:9.2f}"
                f"  {ratio['first p99']:9.2f}  {ratio['gap p99']:7.2f}   {gap:8.3f}"
            )


if __name__ == "__main__":
    main()
