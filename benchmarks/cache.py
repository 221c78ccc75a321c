"""
What the response cache saves: mean response time of a workload in which some prompts come again.

`python -m benchmarks.cache [--rounds N] [--repeats 0,30,60] [--json FILE]`

The same workload, with and without the cache (`Cache-Control: no-cache, no-store`), in turns on one `arriero up`.
Prompts are new in each round; a repeated one is drawn from those before it. `--repeats` are their shares in percent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

from benchmarks import installations
from benchmarks.engine_runs import text
from benchmarks.installations import MODEL

TOKENS, CONTEXT, SLOTS = 32, 512, 4
#: Calls of a measurement, and those at a time.
CALLS, AT_A_TIME = 60, 2


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """One measurement: milliseconds of response time."""

    cached: bool
    #: Share of repeated prompts, percent.
    repeats: int
    mean: float
    p50: float
    p99: float
    #: Calls that got a kept answer, or another call's.
    served: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", default="0,30,60")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    found: list[CacheFigures] = []
    with installations.up(threads=asked.threads, slots=SLOTS, context=CONTEXT) as platform:
        asyncio.run(_measured(platform.url, 0, 0, cached=False))  # warm
        for number in range(1, asked.rounds + 1):
            for repeats in (int(part) for part in asked.repeats.split(",")):
                for cached in (number % 2 == 0, number % 2 == 1):
                    found.append(asyncio.run(_measured(platform.url, number, repeats, cached=cached)))
                    print(found[-1], file=sys.stderr)
    _print(found)
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    return 0


def prompts(number: int, repeats: int, *, cached: bool) -> list[str]:
    """The prompts of a round: equally long and repeated for both contenders, and none has a prompt of the other."""
    chance = random.Random(number * 1_000 + repeats)
    made: list[str] = []
    for call in range(CALLS):
        if made and chance.random() * 100 < repeats:
            made.append(chance.choice(made))
        else:
            seed = number * 10_000 + repeats * 100 + call
            made.append(f"{seed} {'with' if cached else 'less'} {text(seed, 60)}. Go on.")
    return made


async def _measured(url: str, number: int, repeats: int, *, cached: bool) -> CacheFigures:
    times: list[float] = []
    served = 0
    headers = {} if cached else {"Cache-Control": "no-cache, no-store"}
    waiting = iter(prompts(number, repeats, cached=cached))

    async with httpx2.AsyncClient(base_url=url, timeout=300, trust_env=False, verify=False) as client:

        async def one() -> None:
            nonlocal served
            for prompt in waiting:
                body = {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": TOKENS,
                    "temperature": 0,
                }
                began = time.perf_counter()
                answer = await client.post("/v1/chat/completions", json=body, headers=headers)
                times.append((time.perf_counter() - began) * 1000)
                assert answer.status_code == 200, answer.text
                served += answer.headers["X-Arriero-Cache"] in ("hit", "shared")

        await asyncio.gather(*(one() for _ in range(AT_A_TIME)))
    times.sort()
    return CacheFigures(cached, repeats, statistics.mean(times), times[len(times) // 2], times[-1], served)


def _print(found: Sequence[CacheFigures]) -> None:
    table = Table("repeats", "without, mean ms", "with, mean ms", "saved", "with, p50 ms", "calls served by the cache")
    for repeats in dict.fromkeys(one.repeats for one in found):
        without, own = (
            [one for one in found if (one.repeats, one.cached) == (repeats, cached)] for cached in (False, True)
        )
        slow, fast = (statistics.median(one.mean for one in part) for part in (without, own))
        served = sum(one.served for one in own) / len(own)
        p50 = statistics.median(one.p50 for one in own)
        saved = f"{1 - fast / slow:.0%}"
        table.add_row(f"{repeats} %", f"{slow:.0f}", f"{fast:.0f}", saved, f"{p50:.0f}", f"{served:.0f} of {CALLS}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
