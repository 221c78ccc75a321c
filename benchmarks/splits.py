"""
Splits: whether their verdicts are right, what they cost a call, and how soon a bad candidate is gone.

`python -m benchmarks.splits [--rounds N] [--calls N] [--seeds N] [--json FILE]`

Verdicts: seeded outcomes of a known truth, with a look after every 50. Calls: an `arriero up` with a small model;
rounds with and without a split in turn, each of so many calls by four clients. Roll-back: the candidate is a server
that does not answer; from its first failure until the split has ended, and until the last call that went there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from app.inference.splits import evidence
from app.inference.splits.evidence import SplitVerdict, VariantSample
from benchmarks import installations
from benchmarks.installations import MODEL

CLIENTS = 4
#: Control, candidate, outcomes, the smallest effect that matters, and what is right.
TRUTHS = (
    (0.70, 0.80, 6_000, 0.1, SplitVerdict.BETTER),
    (0.70, 0.60, 6_000, 0.1, SplitVerdict.WORSE),
    (0.70, 0.70, 6_000, 0.1, SplitVerdict.EQUAL),
    (0.05, 0.10, 6_000, 0.05, SplitVerdict.BETTER),
    (0.02, 0.02, 6_000, 0.05, SplitVerdict.EQUAL),
    (0.30, 0.30, 4_000, 0.05, None),
    (0.50, 0.50, 4_000, 0.02, None),
)
SERVER = """
[[models]]
name = "server:dead"
use_cases = ["chat"]
slots = 8
[models.remote]
url = "http://127.0.0.1:9/v1"
model = "m"
allowed = true
private = true
retries = 0
"""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How often each verdict came first, of all seeds."""

    control: float
    candidate: float
    effect: float
    right: str
    rate: float
    looked_at: int


def verdicts(seeds: int) -> list[Verdicts]:
    """The share of right verdicts; where none is right, that of seeds without a false one."""
    found = []
    for control, candidate, most, effect, right in TRUTHS:
        first = [_first(seed, control, candidate, most, effect) for seed in range(seeds)]
        if right is None:
            good = [verdict not in (SplitVerdict.BETTER, SplitVerdict.WORSE) for verdict, _ in first]
        else:
            good = [verdict is right for verdict, _ in first]
        looked_at = round(statistics.median(at for _, at in first))
        name = "no difference" if right is None else right.value
        found.append(Verdicts(control, candidate, effect, name, sum(good) / seeds, looked_at))
    return found


def _first(seed: int, control: float, candidate: float, most: int, effect: float) -> tuple[SplitVerdict, int]:
    chance, counts = random.Random(seed), {True: [0, 0], False: [0, 0]}
    for at in range(1, most + 1):
        is_candidate = chance.random() < 0.5
        counts[is_candidate][0] += 1
        counts[is_candidate][1] += chance.random() < (candidate if is_candidate else control)
        if at % 50 == 0:
            before, after = (VariantSample(n, n, x, x, n, x, is_rate=True) for n, x in (counts[False], counts[True]))
            verdict = evidence.compare(before, after, effect, 0.05).verdict(effect, higher_is_better=True)
            if verdict is not SplitVerdict.UNDECIDED:
                return verdict, at
    return SplitVerdict.UNDECIDED, most


def call(client: httpx2.Client, user: str) -> tuple[float, int, str]:
    """One call: its seconds, its status, and the model that answered."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "user": user}
    began = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body, headers={"Cache-Control": "no-cache, no-store"})
    return time.perf_counter() - began, answer.status_code, answer.headers.get("X-Arriero-Model", "")


def latencies(url: str, calls: int) -> list[float]:
    """The seconds of so many calls by some clients at once."""

    def of_client(number: int) -> list[float]:
        with httpx2.Client(base_url=url, timeout=60) as client:
            return [call(client, f"user-{number}-{at}")[0] for at in range(calls // CLIENTS)]

    with ThreadPoolExecutor(CLIENTS) as clients:
        return [one for found in clients.map(of_client, range(CLIENTS)) for one in found]


def rolled_back(url: str) -> dict[str, float]:
    """Seconds from the first failure of a dead candidate until the split has ended, and until the last such failure."""
    split = {
        "split": "dead",
        "model": MODEL,
        "unit": "run",
        "candidates": [{"name": "b", "model": "server:dead"}],
        "ramp": [{"share": 0.5}],
    }
    failures: list[float] = []
    ended = float("nan")
    with httpx2.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/splits", json=split).status_code == 201
        limit = time.perf_counter() + 120
        while time.perf_counter() < limit:
            _, status, _ = call(client, "x")
            now = time.perf_counter()
            if status != 200:
                failures.append(now)
            if client.get("/v1/splits/dead").json()["state"] == "rolled_back":
                ended = now if ended != ended else ended
                if now > ended + 2:
                    break
    return {
        "ended_after_s": ended - failures[0],
        "last_failure_after_s": failures[-1] - failures[0],
        "failures": len(failures),
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"verdicts": [asdict(one) for one in verdicts(given.seeds)]}
    rounds: dict[str, list[list[float]]] = {"without": [], "with": []}
    with installations.up(threads=1, slots=8, context=1024, more=SERVER) as up:
        split = {
            "split": "same",
            "model": MODEL,
            "candidates": [{"name": "b", "set": {"temperature": 0.5}}],
            "ramp": [{"share": 0.5}],
        }
        latencies(up.url, given.calls)
        with httpx2.Client(base_url=up.url, timeout=60) as client:
            for number in range(given.rounds):
                for way in ("without", "with") if number % 2 else ("with", "without"):
                    if way == "with":
                        assert client.post("/v1/splits", json=split).status_code == 201
                    rounds[way].append(latencies(up.url, given.calls))
                    if way == "with":
                        client.post("/v1/splits/same/stop")
                        assert client.delete("/v1/splits/same").status_code == 204
        result["roll_back"] = rolled_back(up.url)
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        values = {way: [sorted(one)[int(quantile * len(one))] for one in found] for way, found in rounds.items()}
        ratios = [after / before for before, after in zip(values["without"], values["with"], strict=True)]
        result[name] = {way: statistics.median(found) * 1000 for way, found in values.items()}
        result[name]["ratio"] = statistics.median(ratios)
    _print(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2))


def _print(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("control", "candidate", "effect", "right", "share of seeds", "outcomes (median)")
    for one in result["verdicts"]:
        table.add_row(*(f"{one[name]}" for name in ("control", "candidate", "effect", "right", "rate", "looked_at")))
    console.print(table)
    for name in ("p50", "p99"):
        found = result[name]
        console.print(
            f"a call, {name}: {found['without']:.1f} ms, with a split {found['with']:.1f}, {found['ratio']:.3f}x"
        )
    console.print(f"roll-back: {result['roll_back']}")


if __name__ == "__main__":
    main()
