"""
The engine beside its peers: throughput, shared prefixes, latency under a long prefill, JSON, embeddings, overhead.

Every figure is a process of its own (`engine_runs.py`), so that nothing warms up for another. The peers of a workload
take turns, in an order that rotates from round to round; medians are shown, and ratios are taken within a round.
Tokens are counted by the wall and by CPU seconds: on a shared machine the second, with `--threads 1` (llama.cpp's
threads wait by spinning), is the steadier one.

`python -m benchmarks.engine --xllamacpp FOLDER [--rounds N] [--workloads NAME,…] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from app.kernel import clock
from benchmarks.engine_runs import Figures
from workers.agent.inventory import THREAD_ENVIRONMENT

#: Where results go by default; git ignores it.
RESULTS = Path(__file__).parent / "results"
#: In the order in which they run. `layout` is measured only when it is named.
WORKLOADS = (
    "distinct",
    "busy",
    "system",
    "shared",
    "mixed",
    "dialogue",
    "json",
    "embeddings",
    "overhead",
    "speculation",
)
#: Dialogues of `engine_dialogues.py`: name, kind, and for arrivals the part of the capacity.
DIALOGUES = (
    ("closed", "closed", 0.0),
    ("chat", "chat", 0.0),
    ("at 60 %", "arrivals", 0.6),
    ("at 120 %", "arrivals", 1.2),
    ("beside", "beside", 0.0),
    ("one", "one", 0.0),
)
#: A process that takes longer than this is ended, and counts as failed.
MOST_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Entry:
    """Who does what: a row of the table."""

    workload: str
    peer: str
    #: What the process is told.
    spec: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of an entry."""

    round: int
    workload: str
    peer: str
    #: Empty when it failed.
    figures: Figures
    seconds: float
    #: Load average of the last minute when it began.
    load: float
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure should be, beside another where one is named. Of several peers, the best counts."""

    workload: str
    figure: str
    #: Peers whose names begin so.
    own: str
    than: str | None
    #: At least this, or at most.
    bound: float
    at_most: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the aims, write the JSON after each round."""
    asked = _parser().parse_args(arguments)
    entries = [entry for entry in entries_of(asked) if asked.server or not entry.spec["runner"].endswith("server")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (_ROOT, asked.xllamacpp))))}
    if asked.server and not _imports("xllamacpp", environment):
        print(
            "the server cannot be imported: `pip install --no-deps --target FOLDER xllamacpp` and give --xllamacpp "
            "FOLDER, or leave it out by --no-server",
            file=sys.stderr,
        )
        return 2
    began = clock.now()
    file = asked.json or RESULTS / f"engine-{began:%Y%m%dT%H%M%S}.json"
    turns: list[Turn] = []
    for number in range(asked.rounds):
        for entry in _in_turn(entries, number):
            turns.append(taken(entry, number, environment))
            _say(turns[-1])
        document = {
            "benchmark": "engine",
            "began": began.isoformat(),
            "seconds": (clock.now() - began).total_seconds(),
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
            "versions": _versions(asked.xllamacpp),
            "threads": asked.threads,
            "rounds": number + 1,
            "load": {"lowest": min(turn.load for turn in turns), "highest": max(turn.load for turn in turns)},
            "summary": summarised(turns),
            "aims": judged(turns, aims_of(asked.streams)),
            "turns": [asdict(turn) for turn in turns],
        }
        # after each round: a long run that is broken off has its figures
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _print(document)
    print(f"load average {document['load']}; written to {file}")
    return int(any(turn.failure for turn in turns))


def entries_of(asked: argparse.Namespace) -> list[Entry]:
    """All that is measured, the peers of a workload beside each other."""
    found: list[Entry] = []

    def add(workload: str, peer: str, runner: str, /, **spec: Any) -> None:
        if workload.split()[0] in asked.workloads:
            found.append(Entry(workload, peer, {"runner": runner, "threads": asked.threads} | spec))

    for streams in asked.streams:
        spec = {"workload": "distinct", "streams": streams, "requests": max(8, streams), "tokens": 64, "reuse": False}
        spec["context"] = streams * 1024
        name = f"distinct {streams}"
        add(name, "engine", "engine", **spec)
        add(name, "server", "server", layout="streams", **spec)
        add(name, "limit", "limit", layout="streams", **spec)
        if streams == 8:
            add(name, "server, unified", "server", layout="unified", **spec)
            add(name, "reproducible engine", "engine", reproducible=True, **spec)
            add(name, "Llama, one by one", "llama", **spec)
        if streams == 32:
            add(name, "engine, unified", "engine", layout="unified", **spec)
    for streams in (1, 8):
        spec = {"workload": "distinct", "streams": streams, "requests": max(3, streams), "reuse": False}
        spec |= {"context": streams * 1024, "tokens": 32 if streams == 1 else 64, "busy": True}
        add(f"busy {streams}", "engine", "engine", **spec)
        add(f"busy {streams}", "engine, threads fixed", "engine", fixed=True, **spec)
        add(f"busy {streams}", "server", "server", layout="streams", **spec)
    for tokens in (50, 300):
        system = {"workload": "system", "shared": tokens, "requests": 32, "tokens": 32}
        name = f"system {tokens}"
        for slots in (8, 32):
            add(name, f"engine, {slots} slots", "engine", streams=slots, context=slots * 1024, **system)
        system["layout"] = "streams"
        for slots in (1, 8):
            add(name, f"server, {slots} slots", "server", streams=slots, context=slots * 1024, **system)
        add(name, "limit, 32 slots", "limit", streams=32, context=32 * 1024, **system)
        add(name, "bound, the prefix is free", "limit", streams=32, context=32 * 1024, free_prefix=True, **system)
    shared = {"workload": "shared", "shared": 800, "requests": 32, "tokens": 32}
    name = "shared 800"
    add(name, "engine, 32 slots", "engine", streams=32, context=32 * 1024, **shared)
    add(name, "engine, 32 slots, unified", "engine", layout="unified", streams=32, context=32 * 1024, **shared)
    for slots in (1, 8):
        add(name, f"server, {slots} slots", "server", layout="streams", streams=slots, context=slots * 1024, **shared)
    add(name, "Llama, one by one", "llama", **shared)
    add(name, "limit, 32 slots, unified", "limit", layout="unified", streams=32, context=32 * 1024, **shared)
    add(name, "bound, the prefix is free", "limit", streams=32, context=32 * 1024, free_prefix=True, **shared)
    add("mixed", "engine", "mixed_engine", streams=8, context=8 * 2048)
    add("mixed", "server", "mixed_server", streams=8, context=8 * 2048, layout="streams")
    for name, kind, load in (one for one in DIALOGUES if one[1] in asked.dialogues):
        spec = {"kind": kind, "seed": asked.seed, "requests": asked.requests, "rate": load * asked.rate}
        for peer in ("engine", "server"):
            layout = {"layout": "streams"} if peer == "server" else {}
            runner = "dialogue" if peer == "engine" else "dialogue_server"
            add(f"dialogue {name}", peer, runner, peer=peer, streams=8, context=8 * 2048, **spec, **layout)
    for temperature in (0.0, 0.7):
        name = f"json {temperature}"
        add(name, "schema", "json", streams=8, context=8192, temperature=temperature, grammar=True)
        add(name, "free text", "json", streams=8, context=8192, temperature=temperature, grammar=False)
    add("embeddings", "engine", "embed_engine", streams=1, context=512, requests=asked.texts)
    add("embeddings", "Llama, one by one", "embed_llama", requests=max(1, asked.texts // 4))
    for temperature, name in ((0.0, "overhead greedy"), (0.8, "overhead top-k 40")):
        add(name, "32 slots", "overhead", streams=32, context=16384, temperature=temperature)
    for workload in ("repetition", "copying", "extraction", "dialogue"):
        for streams in (1, 4):
            spec = {"workload": workload, "streams": streams, "tokens": 128, "turns": 5, "temperature": 0.0}
            add("speculation", f"{workload}, {streams} streams", "speculation", **spec)
    for slots in (4, 8, 16, 32):
        add(f"layout {slots}", "a decode", "layout", streams=slots)
    return found


def aims_of(streams: Sequence[int]) -> list[Aim]:
    """What is to be reached on two CPU cores with SmolLM2-135M."""
    rate = "tokens_per_s"
    return [
        *(Aim(f"distinct {n}", rate, "engine", "server", 1.0) for n in streams),
        Aim("distinct 32", rate, "engine", "limit", 0.97),
        *(Aim(f"busy {n}", rate, "engine", "server", 2.0) for n in (1, 8)),
        *(Aim(f"system {n}", rate, "engine", than, 1.4) for n in (50, 300) for than in ("server, 8", "server")),
        Aim("shared 800", rate, "engine", "server, 8", 3.0),
        Aim("shared 800", rate, "engine", "server", 3.0),
        Aim("shared 800", rate, "engine", "limit", 0.95),
        Aim("mixed", "gap_p99_ms", "engine", "server", 0.5, at_most=True),
        *(
            Aim(f"dialogue {name}", figure, "engine", "server", bound, at_most=figure != rate)
            for name in ("closed", "at 60 %", "at 120 %")
            for figure, bound in ((rate, 1.05), ("first_p50_s", 1.0), ("first_p99_s", 1.0), ("gap_p99_ms", 0.5))
            if name != "at 60 %" or figure != rate  # below the capacity the rate is that of the arrivals
        ),
        Aim("json 0.0", "grammar_us_per_token", "schema", None, 100, at_most=True),
        Aim("json 0.0", "grammar_percent", "schema", None, 10, at_most=True),
        *(
            Aim("speculation", "wall_ratio", f"{kind}, {n} streams", None, 1.5)
            for kind in ("repetition", "copying")
            for n in (1, 4)
        ),
        *(Aim("speculation", "wall_ratio", f"dialogue, {n} streams", None, 0.98) for n in (1, 4)),
        Aim("overhead greedy", "step_ms", "32 slots", None, 0.3, at_most=True),
        Aim("overhead top-k 40", "step_ms", "32 slots", None, 1.0, at_most=True),
    ]


def taken(entry: Entry, number: int, environment: dict[str, str]) -> Turn:
    """One turn, in a process of its own."""
    load, began = os.getloadavg()[0], clock.now()
    if not entry.spec["runner"].endswith("server"):
        environment = {**environment, **THREAD_ENVIRONMENT}  # as a pool has it
    command = [sys.executable, "-m", "benchmarks.engine_runs", json.dumps(entry.spec)]
    figures: Figures = {}
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if entry.spec.get("busy") else None
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=_ROOT, timeout=MOST_SECONDS)
        failure = "" if not done.returncode else " / ".join(done.stderr.strip().splitlines()[-2:]) or "no reason"
        if not failure:
            figures = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        failure = f"it took longer than {MOST_SECONDS} s"
    finally:
        if other is not None:
            other.kill()
            other.wait()
    seconds = (clock.now() - began).total_seconds()
    return Turn(number, entry.workload, entry.peer, figures, seconds, load, failure)


def summarised(turns: Sequence[Turn]) -> dict[str, dict[str, Figures]]:
    """Medians over the rounds: workload -> peer -> figure."""
    found: dict[str, dict[str, Figures]] = {}
    for turn in turns:
        group = [t.figures for t in turns if (t.workload, t.peer) == (turn.workload, turn.peer) and t.figures]
        medians = {name: statistics.median(figures[name] for figures in group) for name in group[0]} if group else {}
        found.setdefault(turn.workload, {})[turn.peer] = medians
    return found


def judged(turns: Sequence[Turn], aims: Sequence[Aim]) -> list[dict[str, Any]]:
    """The aims that were measured: what was seen in each round, and whether the median meets the bound."""
    found = []
    for aim in aims:
        seen = []
        for number in sorted({turn.round for turn in turns}):
            own, than = (_best(turns, number, aim, name) for name in (aim.own, aim.than))
            if own is not None and (aim.than is None or than):
                seen.append(own / than if than else own)
        if seen:
            median = statistics.median(seen)
            met = median <= aim.bound if aim.at_most else median >= aim.bound
            found.append(asdict(aim) | {"seen": seen, "median": median, "met": met})
    return found


def _best(turns: Sequence[Turn], number: int, aim: Aim, name: str | None) -> float | None:
    if name is None:
        return None
    group = [turn for turn in turns if (turn.round, turn.workload) == (number, aim.workload) and turn.figures]
    values = [turn.figures[aim.figure] for turn in group if turn.peer.startswith(name)]
    best: Callable[[Sequence[float]], float] = min if aim.at_most else max
    return best(values) if values else None


def _in_turn(entries: Sequence[Entry], number: int) -> list[Entry]:
    """The entries of each workload, beginning with another one in each round."""
    ordered: list[Entry] = []
    for workload in dict.fromkeys(entry.workload for entry in entries):
        group = [entry for entry in entries if entry.workload == workload]
        start = number % len(group)
        ordered += [*group[start:], *group[:start]]
    return ordered


def _say(turn: Turn) -> None:
    shown = "  ".join(f"{name} {value:.2f}" for name, value in turn.figures.items()) or f"FAILED: {turn.failure}"
    print(f"[{turn.round + 1}] {turn.workload:18} {turn.peer:26} {shown}  ({turn.seconds:.0f} s)", file=sys.stderr)


def _print(document: dict[str, Any]) -> None:
    for workload, peers in document["summary"].items():
        for peer, figures in peers.items():
            shown = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
            print(f"{workload:18} {peer:26} {shown or 'failed'}")
    print()
    for aim in document["aims"]:
        beside = f" / {aim['than']}" if aim["than"] else ""
        seen = ", ".join(f"{value:.2f}" for value in aim["seen"])
        bound = f"{'at most' if aim['at_most'] else 'at least'} {aim['bound']:g}"
        what = f"{aim['workload']}: {aim['figure']} of {aim['own']}{beside}"
        print(f"{'met   ' if aim['met'] else 'MISSED'} {what:66} {bound:14} median {aim['median']:.2f} of {seen}")


def _imports(name: str, environment: dict[str, str]) -> bool:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, env=environment, cwd=_ROOT)
    return done.returncode == 0


def _versions(folder: Path | None) -> dict[str, str]:
    found = {name: version(name) for name in ("llama-cpp-python", "numpy")}
    path = [str(folder)] if folder else sys.path
    return found | {one.name: one.version for one in distributions(name="xllamacpp", path=path)}


def _parser() -> argparse.ArgumentParser:
    def names(value: str) -> list[str]:
        able = (*WORKLOADS, "layout")
        wrong = ", ".join(name for name in value.split(",") if name not in able)
        if wrong:
            raise argparse.ArgumentTypeError(f"no workload {wrong}; there are {', '.join(able)}")
        return value.split(",")

    def numbers(value: str) -> list[int]:
        return [int(number) for number in value.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="llama.cpp's, of all peers")
    parser.add_argument("--streams", type=numbers, default=[1, 2, 4, 8, 16, 32], help="of the distinct prompts")
    parser.add_argument("--requests", type=int, default=48, help="of a dialogue")
    parser.add_argument("--seed", type=int, default=1, help="of the dialogues")
    kinds = list(dict.fromkeys(kind for _, kind, _ in DIALOGUES))
    parser.add_argument("--dialogues", nargs="+", choices=kinds, default=kinds, help="which of them are measured")
    parser.add_argument("--rate", type=float, default=0.43, help="capacity for dialogues, requests/s: that of `closed`")
    parser.add_argument("--texts", type=int, default=1000, help="to embed; Llama gets a quarter of them")
    parser.add_argument("--workloads", type=names, default=list(WORKLOADS), metavar="NAME,…")
    parser.add_argument("--xllamacpp", type=Path, metavar="FOLDER", help="holds the package xllamacpp")
    parser.add_argument("--no-server", dest="server", action="store_false", help="leave llama.cpp's server out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go (benchmarks/results/…)")
    return parser


_ROOT = str(Path(__file__).resolve().parent.parent)


if __name__ == "__main__":
    raise SystemExit(main())
