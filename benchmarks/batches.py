"""
What a running batch costs interactive calls: their times without a batch and with one, and how fast the batch is.

`python -m benchmarks.batches [--rounds N] [--calls N] [--lines N] [--streams N] [--threads N] [--json FILE]`

One `arriero up` on one small model. Each round measures the same calls first without a batch, then while a batch has
taken every slot, in an order that changes from round to round. A call streams 32 tokens; its pause before the next one
is drawn, so that calls meet the batch in all its phases. The last measurement is that of the batch alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from benchmarks.engine_runs import text
from benchmarks.interactive import MODEL, SLOTS, UNCACHED, arriero

#: Tokens of an interactive answer, and of a request of the batch.
TOKENS, BATCH_TOKENS = 32, 64
#: Most seconds between two calls of a stream.
PAUSE = 0.5


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement: milliseconds, and requests of the batch that were done per second."""

    has_batch: bool
    first_p50: float
    first_p99: float
    total_p50: float
    total_p99: float
    lines_per_s: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=100, help="calls of a measurement")
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    found: list[Measured] = []
    with arriero(asked.threads) as ask:
        url = ask.url
        with httpx2.Client(base_url=url, timeout=120, trust_env=False) as client:
            for number in range(asked.rounds):
                for has_batch in (False, True) if number % 2 == 0 else (True, False):
                    batch = _begin(client, asked.lines, number) if has_batch else None
                    found.append(_measure(client, url, batch, asked, number))
                    print(found[-1], file=sys.stderr)
                    if batch is not None:
                        _cancel(client, batch)
            alone = _alone(client, asked.lines)
    _print(found, alone)
    if asked.json is not None:
        document = {
            "machine": platform.processor(),
            "load": os.getloadavg(),
            "batch_alone_lines_per_s": alone,
            "figures": [asdict(one) for one in found],
        }
        asked.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _measure(client: httpx2.Client, url: str, batch: str | None, asked: argparse.Namespace, number: int) -> Measured:
    done, begun = _done(client, batch), time.perf_counter()
    results = asyncio.run(_calls(url, asked.calls, asked.streams, number))
    rate = None if batch is None else (_done(client, batch) - done) / (time.perf_counter() - begun)
    firsts, totals = [first * 1000 for first, _ in results], [total * 1000 for _, total in results]
    return Measured(
        batch is not None,
        _quantile(firsts, 0.5),
        _quantile(firsts, 0.99),
        _quantile(totals, 0.5),
        _quantile(totals, 0.99),
        rate,
    )


async def _calls(url: str, calls: int, streams: int, number: int) -> list[tuple[float, float]]:
    """Seconds to the first token and to the end of each call."""
    waiting, chance = iter(range(calls)), random.Random(number)
    results: list[tuple[float, float]] = []

    async def stream() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=120, trust_env=False, verify=False) as client:
            for call in waiting:
                results.append(await _call(client, f"{number}-{call} {text(number * 10_000 + call, 60)}. Go on."))
                await asyncio.sleep(chance.random() * PAUSE)

    await asyncio.gather(*(stream() for _ in range(streams)))
    return results


async def _call(client: httpx2.AsyncClient, prompt: str) -> tuple[float, float]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "logit_bias": {"2": -100},  # the end of the text: every answer has the same length
    }
    begun, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=UNCACHED) as answer:
        async for line in answer.aiter_lines():
            if not first and line.startswith("data: {") and '"content":"' in line and '"content":""' not in line:
                first = time.perf_counter() - begun
    return first, time.perf_counter() - begun


def _begin(client: httpx2.Client, lines: int, number: int) -> str:
    """Begin a batch, and wait until it has taken every slot for a while."""
    requests = [
        {
            "custom_id": str(line),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"{text(900_000 + number * lines + line, 100)}. Why?"}],
                "max_tokens": BATCH_TOKENS,
            },
        }
        for line in range(lines)
    ]
    content = "\n".join(json.dumps(request) for request in requests).encode()
    made = client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})
    file_id = made.raise_for_status().json()["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch: str = client.post("/v1/batches", json=body).raise_for_status().json()["id"]
    while _done(client, batch) < SLOTS:
        time.sleep(0.1)
    return batch


def _cancel(client: httpx2.Client, batch: str) -> None:
    client.post(f"/v1/batches/{batch}/cancel", headers={"Content-Type": "application/json"}).raise_for_status()
    while client.get(f"/v1/batches/{batch}").json()["status"] != "cancelled":
        time.sleep(0.1)


def _alone(client: httpx2.Client, lines: int) -> float:
    """Requests per second of a batch without any calls."""
    batch = _begin(client, lines, 99)
    done, begun = _done(client, batch), time.perf_counter()
    time.sleep(30)
    rate = (_done(client, batch) - done) / (time.perf_counter() - begun)
    _cancel(client, batch)
    return rate


def _done(client: httpx2.Client, batch: str | None) -> int:
    if batch is None:
        return 0
    found: dict[str, Any] = client.get(f"/v1/batches/{batch}").raise_for_status().json()
    assert found["status"] in ("validating", "in_progress"), found
    return int(found["request_counts"]["completed"])


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def _print(found: Sequence[Measured], alone: float) -> None:
    fields = ("first_p50", "first_p99", "total_p50", "total_p99")
    table = Table("", "first token p50, ms", "p99", "whole answer p50, ms", "p99", "batch, requests/s")
    medians = {
        has_batch: [statistics.median(getattr(one, field) for one in found if one.has_batch is has_batch)
                    for field in fields]
        for has_batch in (False, True)
    }  # fmt: skip
    rate = statistics.median(one.lines_per_s for one in found if one.lines_per_s is not None)
    table.add_row("no batch", *(f"{value:.0f}" for value in medians[False]), "")
    table.add_row("with a batch", *(f"{value:.0f}" for value in medians[True]), f"{rate:.2f}")
    ratios = (after / before for before, after in zip(medians[False], medians[True], strict=True))
    table.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios), f"{alone:.2f} alone")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
