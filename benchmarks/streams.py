"""
Many streams at a time on one small model: no error, no token lost or doubled, memory flat, slots freed.

`python -m benchmarks.streams [--streams 200] [--seconds 180] [--json FILE]`

Clients stream one answer after the other from a whole `arriero up`. One call in `VANISHING` leaves after its first
pieces of text. Afterwards each stream is compared with what was recorded: its token stream has consecutive ids, and its
pieces are the text of the run's output. Exits with 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import installations
from benchmarks.engine_runs import text
from benchmarks.installations import MODEL

TOKENS, CONTEXT, SLOTS = 32, 512, 16
#: One call in so many leaves after some text.
VANISHING = 12
#: Most seconds until the run of a client that left has ended; most growth of the API's memory after its first third.
FREED_WITHIN, GROWTH = 1.0, 0.05
#: Seconds for one call: all others may be before it.
_PATIENCE = 600.0
#: Streams that are compared at a time.
_COMPARED = 8


@dataclass(slots=True)
class Streamed:
    """What the client saw of one call."""

    run_id: str = ""
    text: str = ""
    pieces: int = 0
    tokens: int = 0
    #: Seconds until the first text.
    first: float = 0.0
    #: When the client left, in seconds since 1970; 0 when it stayed.
    left_at: float = 0.0
    #: What was wrong.
    error: str = ""


@dataclass(slots=True)
class StreamsReport:
    """The figures of the run."""

    streams: int
    #: Until the last call has ended.
    seconds: float
    calls: int = 0
    vanished: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    #: Streams whose ids or texts differ from the record.
    wrong: list[str] = field(default_factory=list)
    first_p50: float = 0.0
    first_p99: float = 0.0
    #: Seconds from the leaving of a client to the end of its run.
    freed_p50: float = 0.0
    freed_max: float = 0.0
    #: Mebibytes of the API: after a third of the time, and at the end (medians of the last tenth).
    memory_third: float = 0.0
    memory_end: float = 0.0
    #: Processor seconds for each token, by program.
    processor_ms: dict[str, float] = field(default_factory=dict)

    @property
    def broken(self) -> list[str]:
        """The promises that were broken."""
        found = [f"{len(self.errors)} errors"] if self.errors else []
        found += [f"{len(self.wrong)} streams differ from their record"] if self.wrong else []
        if self.freed_max > FREED_WITHIN:
            found.append(f"a slot was freed after {self.freed_max:.2f} s")
        if self.memory_end > self.memory_third * (1 + GROWTH):
            found.append(f"the API grew from {self.memory_third:.0f} to {self.memory_end:.0f} MiB")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.streams")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    with installations.up(threads=asked.threads, slots=SLOTS, context=CONTEXT) as platform:
        report = asyncio.run(_measured(platform, asked.streams, asked.seconds))
    _print(report)
    if asked.json is not None:
        asked.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 1 if report.broken else 0


async def _measured(platform: installations.Up, streams: int, seconds: float) -> StreamsReport:
    report = StreamsReport(streams, seconds)
    processes = platform.processes()
    limits = httpx2.Limits(max_connections=streams + _COMPARED, max_keepalive_connections=streams)
    async with httpx2.AsyncClient(
        base_url=platform.url, timeout=_PATIENCE, limits=limits, trust_env=False, verify=False
    ) as client:
        sizes: list[int] = []
        memory = asyncio.create_task(_memory(processes["api"], sizes))
        before = _processor(processes)
        began = time.monotonic()
        found = await _load(client, streams, seconds)
        report.seconds = time.monotonic() - began
        after = _processor(processes)
        memory.cancel()
        await asyncio.gather(memory, return_exceptions=True)
        await _compare(client, found, report)
    report.calls = len(found)
    report.vanished = sum(one.left_at > 0 for one in found)
    report.tokens = sum(one.tokens or one.pieces for one in found)
    report.errors += [f"{one.run_id}: {one.error}" for one in found if one.error]
    firsts = sorted(one.first for one in found if one.first)
    if firsts:
        report.first_p50, report.first_p99 = firsts[len(firsts) // 2], firsts[len(firsts) * 99 // 100]
    third, tenth = len(sizes) // 3, max(len(sizes) // 10, 1)
    report.memory_third = statistics.median(sizes[third : third + tenth]) / 2**20
    report.memory_end = statistics.median(sizes[-tenth:]) / 2**20
    report.processor_ms = {
        name: round((after[name] - used) * 1000 / max(report.tokens, 1), 3) for name, used in before.items()
    }
    return report


async def _memory(process: psutil.Process, sizes: list[int]) -> None:
    while True:
        sizes.append(process.memory_info().rss)
        await asyncio.sleep(0.5)


def _processor(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: sum(one.cpu_times()[:2]) for name, one in processes.items() if one.is_running()}


async def _load(client: httpx2.AsyncClient, streams: int, seconds: float) -> list[Streamed]:
    """Keep `streams` calls going for `seconds`, and wait for the last ones."""
    until, numbers = time.monotonic() + seconds, iter(range(10_000_000))
    found: list[Streamed] = []

    async def one() -> None:
        while time.monotonic() < until:
            number = next(numbers)
            found.append(await _call(client, number))

    await asyncio.gather(*(one() for _ in range(streams)))
    return found


async def _call(client: httpx2.AsyncClient, number: int) -> Streamed:
    result = Streamed()
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"{number} {text(number, 20)}. Go on."}],
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    leaves, began, ended = number % VANISHING == VANISHING - 1, time.monotonic(), False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            result.run_id = answer.headers.get("X-Arriero-Run", "")
            if answer.status_code != 200:
                result.error = f"status {answer.status_code}: {(await answer.aread()).decode()[:200]}"
                return result
            async for line in answer.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    _read(result, json.loads(line[6:]), began)
                if leaves and result.pieces >= 3:
                    break
    except httpx2.HTTPError as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    if leaves and not ended:
        result.left_at = time.time()
    elif not ended and not result.error:
        result.error = "the stream has no end"
    return result


def _read(result: Streamed, chunk: dict[str, Any], began: float) -> None:
    if "error" in chunk:
        result.error = str(chunk["error"]["message"])
        return
    piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    if piece:
        result.first = result.first or time.monotonic() - began
        result.pieces += 1
        result.text += piece
    result.tokens = (chunk.get("usage") or {}).get("completion_tokens", result.tokens)


async def _compare(client: httpx2.AsyncClient, found: Sequence[Streamed], report: StreamsReport) -> None:
    """Compare what clients saw with what was recorded."""
    freed: list[float] = []
    gate = asyncio.Semaphore(_COMPARED)

    async def one(seen: Streamed) -> None:
        async with gate:
            wrong = await _difference(client, seen, freed)
        if wrong:
            report.wrong.append(f"{seen.run_id}: {wrong}")

    await asyncio.gather(*(one(seen) for seen in found if not seen.error))
    if freed:
        report.freed_p50, report.freed_max = statistics.median(freed), max(freed)


async def _difference(client: httpx2.AsyncClient, seen: Streamed, freed: list[float]) -> str:
    """What differs between a stream and its record; empty when nothing does."""
    run = await _ended(client, seen.run_id)
    if seen.left_at:
        if run["state"] == "cancelled":
            freed.append(datetime.fromisoformat(run["finished_at"]).timestamp() - seen.left_at)
            return ""
        return "" if run["state"] == "succeeded" else f"it is {run['state']}"
    if run["state"] != "succeeded":
        return f"it is {run['state']}"
    recorded = run["output"]["answer"]["choices"][0]["message"]["content"]
    if seen.text != recorded:
        return f"the client has {seen.text!r}, the record {recorded!r}"
    answer = await client.get(f"/v1/runs/{seen.run_id}/steps/answer/tokens")
    lines = answer.text.splitlines()
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
    if ids != [f"{ids[0].partition('-')[0]}-{number}" for number in range(1, len(ids) + 1)]:
        return f"its ids are {ids}"
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    written = "".join(json.loads(value) for event, value in zip(events, data, strict=True) if event == "text")
    return "" if written == recorded else f"its token stream has {written!r}, the record {recorded!r}"


async def _ended(client: httpx2.AsyncClient, run_id: str) -> dict[str, Any]:
    until = time.monotonic() + _PATIENCE
    while True:
        answer = await client.get(f"/v1/runs/{run_id}")
        run: dict[str, Any] = answer.json() if answer.status_code == 200 else {"state": "absent"}
        if run["state"] in ("succeeded", "failed", "cancelled") or time.monotonic() > until:
            return run
        await asyncio.sleep(0.1)


def _print(report: StreamsReport) -> None:
    table = Table("", "")
    rows: dict[str, Any] = {
        "streams at a time": report.streams,
        "calls": report.calls,
        "tokens": report.tokens,
        "tokens/s": f"{report.tokens / report.seconds:.0f}",
        "errors": len(report.errors),
        "streams that differ from their record": len(report.wrong),
        "first token, s (p50 / p99)": f"{report.first_p50:.2f} / {report.first_p99:.2f}",
        "clients that left": report.vanished,
        "their slots were free after, s (p50 / most)": f"{report.freed_p50:.2f} / {report.freed_max:.2f}",
        "memory of the API, MiB (after a third / at the end)": f"{report.memory_third:.0f} / {report.memory_end:.0f}",
        "processor time for a token, ms": ", ".join(f"{name} {ms:.2f}" for name, ms in report.processor_ms.items()),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console = Console()
    console.print(table)
    for error, times in Counter(report.errors + report.wrong).most_common(10):
        console.print(f"{times} x {error}", style="red", markup=False)
    for promise in report.broken:
        console.print(f"broken: {promise}", style="bold red", markup=False)


if __name__ == "__main__":
    sys.exit(main())
