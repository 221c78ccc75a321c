"""
What a call over HTTP costs beyond the engine: time to the first token, tokens per second, added time.

`python -m benchmarks.interactive --xllamacpp FOLDER [--rounds N] [--streams 1,4,16] [--json FILE]`

Contenders in turn within each round, in rotating order, on one model with the same slots and context: the whole
platform (`arriero up`, over loopback), llama.cpp's own server over HTTP, and the bare engine in this process. Every
prompt is new, so no prefix helps anyone beyond the chat template's.
Added time is measured inside each call of the platform: what the client waited for its first token, less what the
engine took from its acceptance of the request (recorded with the attempt).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from benchmarks import installations
from benchmarks.engine_runs import model_path, text
from benchmarks.installations import MODEL

TOKENS, CONTEXT, SLOTS = 32, 512, 16
#: Every answer is computed: the response cache gives none and keeps none.
UNCACHED = {"Cache-Control": "no-cache, no-store"}
#: Calls of a measurement: for each stream, and at the least.
CALLS, LEAST_CALLS = 6, 24
_SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], int(sys.argv[2]), int(sys.argv[2]) * int(sys.argv[3])
params.kv_unified, params.n_batch, params.n_ubatch, params.port, params.verbosity = True, 512, 512, 0, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(86400)
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement: milliseconds, and tokens per second of all streams together."""

    contender: str
    streams: int
    first_p50: float
    first_p99: float
    tokens_per_s: float
    #: Of the platform only.
    added_p50: float | None = None
    added_p99: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.interactive")
    parser.add_argument("--xllamacpp", type=Path, metavar="FOLDER", help="holds the package xllamacpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    streams = [int(part) for part in asked.streams.split(",")]
    contenders: list[tuple[str, Callable[[], Any]]] = [("arriero", lambda: arriero(asked.threads))]
    if asked.xllamacpp is not None:
        contenders.append(("llama-server", lambda: llama_server(asked.xllamacpp, asked.threads)))
    contenders.append(("engine", lambda: engine(asked.threads)))
    found: list[Figures] = []
    for number in range(asked.rounds):
        for name, start in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
            with start() as ask:
                for many in streams:
                    found.append(measured(name, ask, many, number))
                    print(found[-1], file=sys.stderr)
    _print(found, streams)
    if asked.json is not None:
        document = {"machine": platform.processor(), "load": os.getloadavg(), "figures": [asdict(one) for one in found]}
        asked.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def measured(name: str, ask: Any, streams: int, number: int) -> Figures:
    """Keep `streams` calls going until all have ended."""

    async def run() -> tuple[list[Any], float]:
        waiting = iter(range(max(LEAST_CALLS, CALLS * streams)))
        results: list[Any] = []

        async def one() -> None:
            for call in waiting:
                seed = number * 10_000 + streams * 100 + call
                results.append(await ask(f"{seed} {text(seed, 60)}. Go on."))

        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(streams)))
        return results, time.perf_counter() - begun

    results, seconds = asyncio.run(run())
    firsts = [first * 1000 for first, _, _ in results]
    added = [one * 1000 for _, _, one in results if one is not None]
    return Figures(
        name,
        streams,
        _quantile(firsts, 0.5),
        _quantile(firsts, 0.99),
        sum(tokens for _, tokens, _ in results) / seconds,
        _quantile(added, 0.5) if added else None,
        _quantile(added, 0.99) if added else None,
    )


@contextmanager
def arriero(threads: int) -> Iterator[Any]:
    """The whole platform."""
    with installations.up(threads=threads, slots=SLOTS, context=CONTEXT) as found:
        yield _client(found.url, recorded=True)


@contextmanager
def llama_server(folder: Path, threads: int) -> Iterator[Any]:
    """llama.cpp's own server."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", _SERVER, str(model_path()), str(SLOTS), str(CONTEXT), str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
    try:
        assert process.stdout is not None
        address = next(line.strip() for line in process.stdout if line.strip().startswith("http"))
        while httpx2.get(f"{address}/health").status_code != 200:
            time.sleep(0.1)
        yield _client(address, recorded=False)
    finally:
        process.kill()
        process.wait()


@contextmanager
def engine(threads: int) -> Iterator[Any]:
    """The bare engine, in this process."""
    from app.inference.requests import ChatMessage, GenerateRequest, PriorityClass, Sampling
    from workers.engine.engine import LlamaEngine
    from workers.engine.options import EngineOptions

    made = LlamaEngine(model_path(), EngineOptions(slots=SLOTS, context=SLOTS * CONTEXT, threads=threads))

    async def ask(prompt: str) -> tuple[float, int, float | None]:
        request = GenerateRequest(
            messages=(ChatMessage("user", prompt),),
            max_tokens=TOKENS,
            sampling=Sampling(temperature=0),
            priority=PriorityClass.INTERACTIVE,
        )
        ticket = made.generate(request, lambda _: None)
        done = await asyncio.to_thread(ticket.result)
        return done.time_to_first.total_seconds(), done.tokens_out, None

    try:
        yield ask
    finally:
        made.close()


def _client(url: str, *, recorded: bool) -> Any:
    """A function that asks a server and returns: seconds to the first token, tokens, added seconds."""

    async def ask(prompt: str) -> tuple[float, int, float | None]:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        first, tokens = 0.0, 0
        async with httpx2.AsyncClient(timeout=120, trust_env=False, verify=False) as client:
            begun = time.perf_counter()
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=UNCACHED) as answer:
                run = answer.headers.get("X-Arriero-Run", "")
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if not first and any(choice["delta"].get("content") for choice in chunk["choices"]):
                        first = time.perf_counter() - begun
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            added = await _added(client, url, run, first) if recorded else None
        return first, tokens, added

    ask.url = url  # type: ignore[attr-defined] # for other benchmarks of the same platform
    return ask


async def _added(client: httpx2.AsyncClient, url: str, run: str, first: float) -> float:
    """What the platform added to the engine's own time to the first token."""
    while True:
        answer = await client.get(f"{url}/v1/runs/{run}")
        attempts = answer.json()["steps"][0]["attempts"] if answer.status_code == 200 else []
        if attempts and attempts[-1]["first_token_ms"] is not None:
            return first - float(attempts[-1]["first_token_ms"]) / 1000
        await asyncio.sleep(0.01)


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def _print(found: Sequence[Figures], streams: Sequence[int]) -> None:
    table = Table("streams", "contender", "first token p50, ms", "p99", "tokens/s", "added p50, ms", "added p99")
    for many in streams:
        for name in dict.fromkeys(one.contender for one in found):
            own = [one for one in found if (one.contender, one.streams) == (name, many)]
            columns = [
                statistics.median(values)
                if (values := [v for one in own if (v := getattr(one, field)) is not None])
                else None
                for field in ("first_p50", "first_p99", "tokens_per_s", "added_p50", "added_p99")
            ]
            table.add_row(str(many), name, *("" if value is None else f"{value:.1f}" for value in columns))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
