"""
Stored prefixes: restoring them beside computing them, and the first token of a restarted engine.

For each length of a prefix and each source (computed, host memory, file in the page cache, file read from the disk),
the time until the first token of a prompt that continues it. The sources of a length take turns in one process.
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
from pathlib import Path
from time import perf_counter
from typing import Any

from app.catalog import files
from app.inference.requests import GenerateRequest, Sampling
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

SOURCES = ("computed", "memory", "file, cached", "file, from disk")
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
    sizes: dict[int, int] = {}
    saves: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.rounds):
            for tokens in asked.lengths:
                for source in _turned(number):
                    seconds, size, save = measured(path, tokens, source, Path(folder) / f"kv{number}-{tokens}", asked)
                    times[tokens][source].append(seconds)
                    sizes[tokens] = size or sizes.get(tokens, 0)
                    saves += [save] if save else []
    rows = [
        {"tokens": tokens, "bytes": sizes[tokens]}
        | {source: statistics.median(found) for source, found in times[tokens].items()}
        for tokens in asked.lengths
    ]
    print(f"{'tokens':>7} {'MiB':>7} " + " ".join(f"{source:>16}" for source in SOURCES))
    for row in rows:
        print(
            f"{row['tokens']:>7} {row['bytes'] / 2**20:>7.1f} "
            + " ".join(f"{1000 * row[source]:>13.1f} ms" for source in SOURCES)
        )
    document = {"benchmark": "kv_store", "model": path.name, "threads": asked.threads, "rounds": asked.rounds,
                "encrypted": asked.encrypted, "load": os.getloadavg()[0], "seconds_to_first_token": rows,
                "save_seconds": saves, "turns": times}  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for source in SOURCES[1:]:
        better = [row["tokens"] for row in rows if row[source] < row["computed"]]
        print(f"{source}: sooner than computed from {min(better, default=None)} tokens on")
    return 0


def measured(path: Path, tokens: int, source: str, folder: Path, asked: argparse.Namespace) -> tuple[float, int, float]:
    """Seconds from the submission to the first token, the bytes of the state, and the seconds of its saving."""
    stores = source.startswith("file")
    options: dict[str, Any] = {"slots": 1, "kept": 0, "context": 4096, "threads": asked.threads, "vectors": False}
    if source == "computed":
        options["store_bytes"] = 0
    if stores:
        options |= {"store_folder": folder, "store_disk_bytes": 2**32, "store_encrypted": asked.encrypted,
                    "store_key": "the key of the benchmark"}  # fmt: skip
    engine = LlamaEngine(path, EngineOptions(**options))
    prefix = _text(engine, tokens)
    warm = "Something else. " * 10
    save = 0.0
    try:
        if source != "computed":
            ask(engine, prefix, tokens)
            ask(engine, warm, 20)
            save = engine.metrics().store.save_seconds
        if stores:  # a restarted engine: its memory is empty
            engine.close()
            if source == "file, from disk":
                _drop_cache(folder)
            engine = LlamaEngine(path, EngineOptions(**options))
            ask(engine, warm, 20)
        else:
            ask(engine, warm, 20)
        before = engine.metrics()
        seconds = ask(engine, f"{prefix} and then", tokens)
        now = engine.metrics()
        restored = now.store.restored - before.store.restored
        if restored != (source != "computed"):
            raise RuntimeError(f"{tokens} tokens, {source}: {restored} restored")
        size = int(now.store.bytes_read) if stores else 0
        return seconds, size, save
    finally:
        engine.close()


def ask(engine: LlamaEngine, prompt: str, _: int) -> float:
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


def _turned(number: int) -> Sequence[str]:
    at = number % len(SOURCES)
    return SOURCES[at:] + SOURCES[:at]


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
