"""
Splits: whether their verdicts are right, what they cost a call, and how soon a bad candidate is gone.

`python -m benchmarks.splits [--rounds N] [--calls N] [--seeds N] [--only shadow] [--json FILE]`

Verdicts: seeded outcomes of a known truth, with a look after every 50. Calls: an `arriero up` with a small model;
rounds with and without a split in turn, each of so many calls by four clients. Roll-back: the candidate is a server
that does not answer; from its first failure until the split has ended, and until the last call that went there.
Shadows: the same rounds with a shadow of every call beside none, whose candidates begin when nobody waits, or `always`;
and how many pairs there are half a minute later.
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
    parts = ("verdicts", "split", "shadow", "roll_back")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--when", choices=("idle", "always"), default="idle")
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chosen = given.only or parts
    result: dict[str, Any] = {}
    if "verdicts" in chosen:
        result["verdicts"] = [asdict(one) for one in verdicts(given.seeds)]
    if set(chosen) - {"verdicts"}:
        with installations.up(threads=1, slots=8, context=1024, more=SERVER) as up:
            latencies(up.url, given.calls)
            with httpx2.Client(base_url=up.url, timeout=60) as client:
                if "split" in chosen:
                    result["split"] = _split(client, up.url, given.rounds, given.calls)
                if "shadow" in chosen:
                    result["shadow"], result["pairs"] = _shadow(client, up.url, given.rounds, given.calls, given.when)
            if "roll_back" in chosen:
                result["roll_back"] = rolled_back(up.url)
    _print(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2))


def _split(client: httpx2.Client, url: str, rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Calls with and without a split, in turn."""
    candidates = [{"name": "b", "set": {"temperature": 0.5}}]
    split = {"split": "same", "model": MODEL, "candidates": candidates, "ramp": [{"share": 0.5}]}
    found: dict[str, list[list[float]]] = {"without": [], "with": []}
    for number in range(rounds):
        for way in ("without", "with") if number % 2 else ("with", "without"):
            if way == "with":
                assert client.post("/v1/splits", json=split).status_code == 201
            found[way].append(latencies(url, calls))
            if way == "with":
                client.post("/v1/splits/same/stop")
                assert client.delete("/v1/splits/same").status_code == 204
    return _ratios(found, "without", "with")


def _shadow(
    client: httpx2.Client, url: str, rounds: int, calls: int, when: str
) -> tuple[dict[str, dict[str, float]], int]:
    """Calls with and without a shadow of every call, in turn; and the pairs of the last round."""
    candidate = {"set": {"temperature": 0.5}}
    shadow = {"shadow": "all", "model": MODEL, "share": 1.0, "max_open": 10_000, "when": when, "candidate": candidate}
    found: dict[str, list[list[float]]] = {"alone": [], "shadowed": []}
    pairs = 0
    for number in range(rounds):
        for way in ("alone", "shadowed") if number % 2 else ("shadowed", "alone"):
            if way == "shadowed":
                assert client.post("/v1/shadows", json=shadow).status_code == 201
                time.sleep(3)  # what ended before is read
            found[way].append(latencies(url, calls))
            if way == "shadowed":
                pairs = _settled(client, calls)
                client.post("/v1/shadows/all/stop")
                assert client.delete("/v1/shadows/all").status_code == 204
    return _ratios(found, "alone", "shadowed"), pairs


def _settled(client: httpx2.Client, calls: int) -> int:
    """Wait until each call is a pair, and return how many are compared after half a minute at the latest."""
    limit = time.perf_counter() + 30
    while True:
        found = client.get("/v1/shadows/all").json()
        done: int = found["compared"] + sum(found["skipped"].values())
        if done >= calls or time.perf_counter() > limit:
            return int(found["compared"])
        time.sleep(0.5)


def _ratios(rounds: dict[str, list[list[float]]], before: str, after: str) -> dict[str, dict[str, float]]:
    """Quantiles in milliseconds, medians of rounds, and the median of the ratios of each round."""
    found = {}
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        values = {way: [sorted(one)[int(quantile * len(one))] for one in listed] for way, listed in rounds.items()}
        ratios = [second / first for first, second in zip(values[before], values[after], strict=True)]
        found[name] = {way: statistics.median(listed) * 1000 for way, listed in values.items()}
        found[name]["ratio"] = statistics.median(ratios)
    return found


def _print(result: dict[str, Any]) -> None:
    console = Console()
    if "verdicts" in result:
        table = Table("control", "candidate", "effect", "right", "share of seeds", "outcomes (median)")
        for one in result["verdicts"]:
            table.add_row(
                *(f"{one[name]}" for name in ("control", "candidate", "effect", "right", "rate", "looked_at"))
            )
        console.print(table)
    for kind in ("split", "shadow"):
        for name, found in result.get(kind, {}).items():
            shown = ", ".join(f"{way} {value:.1f} ms" for way, value in found.items() if way != "ratio")
            console.print(f"calls, {kind}, {name}: {shown}; {found['ratio']:.3f}x")
    for name in ("pairs", "roll_back"):
        if name in result:
            console.print(f"{name}: {result[name]}")


if __name__ == "__main__":
    main()
