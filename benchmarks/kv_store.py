"""
Stored prefixes: restoring them beside computing them, and the first token of a restarted engine.

For each length of a prefix and each source (computed, host memory, file in the page cache, file read from the disk),
the time until the first token of a prompt that continues it. The sources of a length are measured one after the other
in one process, in every other round in the opposite order: first a prefix that is computed, or first the others.
Every engine has one slot and keeps nothing, so the prefix has left the cache before each measurement.

`python -m benchmarks.kv_store [--model FILE] [--rounds N] [--threads N] [--lengths N,…] [--encrypted] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from app.catalog import files
from app.inference.requests import GenerateRequest, Sampling
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

SOURCES = ("computed", "memory", "file, cached", "file, from disk")
#: Parts of that time, and the saving before.
STEPS = ("save", "load", "read")
#: A prompt that takes the place of another one in the cache.
_WARM = "Something else. " * 10
#: What texts are made of.
_WORDS = (
    *("the", "old", "road", "over", "high", "mountains", "was", "long", "and", "llamas"),
    *("that", "walked", "it", "knew", "every", "stone", "of", "each", "valley"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table and one JSON document."""
    asked = _parser().parse_args(arguments)
    path = asked.model or files.locate(files.read_catalog().get("smollm2:135m"), Path())
    times: dict[int, dict[str, list[float]]] = {n: {source: [] for source in SOURCES} for n in asked.lengths}
    figures: dict[int, list[Stored]] = {n: [] for n in asked.lengths}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.rounds):
            for tokens in asked.lengths:
                if number % 2 == 0:
                    times[tokens]["computed"].append(computed(path, tokens, asked))
                found = stored(path, tokens, Path(folder) / f"kv{number}-{tokens}", asked)
                for source, seconds in found.seconds.items():
                    times[tokens][source].append(seconds)
                figures[tokens].append(found)
                if number % 2:
                    times[tokens]["computed"].append(computed(path, tokens, asked))
                taken = " ".join(f"{source}: {times[tokens][source][-1]:.3f} s" for source in SOURCES)
                print(f"round {number + 1}, {tokens} tokens, {found.size} bytes: {taken}", flush=True)
    rows = [
        {"tokens": tokens, "bytes": figures[tokens][0].size}
        | {name: statistics.median(getattr(one, name) for one in figures[tokens]) for name in STEPS}
        | {source: statistics.median(found) for source, found in times[tokens].items()}
        for tokens in asked.lengths
    ]
    print(f"{'tokens':>7} {'MiB':>7} " + " ".join(f"{name:>16}" for name in (*SOURCES, *STEPS)))
    for row in rows:
        print(
            f"{row['tokens']:>7} {row['bytes'] / 2**20:>7.1f} "
            + " ".join(f"{1000 * row[source]:>13.1f} ms" for source in (*SOURCES, *STEPS))
        )
    document = {"benchmark": "kv_store", "model": path.name, "threads": asked.threads, "rounds": asked.rounds,
                "encrypted": asked.encrypted, "load": os.getloadavg()[0], "seconds_to_first_token": rows,
                "rounds_to_first_token": times}  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for source in SOURCES[1:]:
        better = [row["tokens"] for row in rows if row[source] < row["computed"]]
        print(f"{source}: sooner than computed from {min(better, default=None)} tokens on")
    return 0


@dataclass(frozen=True, slots=True)
class Stored:
    """What was measured of one prefix in one round."""

    #: Seconds from the submission to the first token, by source.
    seconds: dict[str, float]
    #: Bytes of its state.
    size: int
    #: Seconds of saving and loading the state, and of reading its file and verifying it.
    save: float
    load: float
    read: float


def computed(path: Path, tokens: int, asked: argparse.Namespace) -> float:
    """Seconds from the submission to the first token, without a store."""
    engine = LlamaEngine(path, EngineOptions(**_options(asked), store_bytes=0))
    try:
        ask(engine, _WARM)
        return ask(engine, f"{_text(engine, tokens)} and then")
    finally:
        engine.close()


def stored(path: Path, tokens: int, folder: Path, asked: argparse.Namespace) -> Stored:
    """Restore a prefix from memory, and then twice in a restarted engine from its file."""
    options = _options(asked) | {"store_folder": folder, "store_disk_bytes": 2**32, "store_encrypted": asked.encrypted,
                                 "store_key": "the key of the benchmark"}  # fmt: skip
    seconds: dict[str, float] = {}
    save = load = read = 0.0
    size = 0
    for source in SOURCES[1:]:
        if source == "file, from disk":
            _drop_cache(folder)
        engine = LlamaEngine(path, EngineOptions(**options))
        try:
            prefix = _text(engine, tokens)
            if source == "memory":
                ask(engine, prefix)
            ask(engine, _WARM)
            seconds[source] = ask(engine, f"{prefix} and then")
            store = engine.metrics().store
            if store.restored != 1 or store.files_read != (source != "memory"):
                raise RuntimeError(f"{tokens} tokens, {source}: {store}")
            save, load = store.save_seconds or save, store.restore_seconds
            size, read = store.bytes_read, store.read_seconds if source == "file, cached" else read
        finally:
            engine.close()
    return Stored(seconds, int(size), save, load, read)


def _options(asked: argparse.Namespace) -> dict[str, Any]:
    return {"slots": 1, "kept": 0, "context": 4096, "threads": asked.threads, "vectors": False}


def ask(engine: LlamaEngine, prompt: str) -> float:
    """Seconds to the first token, by the engine's own clock."""
    request = GenerateRequest(prompt=prompt, max_tokens=1, sampling=Sampling(temperature=0, ignore_end=True))
    began = perf_counter()
    result = engine.generate(request).result(300)
    return result.time_to_first.total_seconds() or perf_counter() - began


def _text(engine: LlamaEngine, tokens: int) -> str:
    """A text of so many tokens, or one more."""
    words = [_WORDS[(7 * index + index // 19) % len(_WORDS)] for index in range(tokens)]
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if engine.count_texts([" ".join(words[:middle])])[0] >= tokens else (middle + 1, high)
    return " ".join(words[:low])


def _drop_cache(folder: Path) -> None:
    """Drop the files from the page cache, as far as the system does it."""
    for file in folder.glob("*.kv*"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_store")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--encrypted", action="store_true")
    parser.add_argument("--json", type=Path)
    lengths = "100,250,500,1000,2000"
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=lengths)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
