"""
What the platform withstands: on against off under the same seeded faults, and its uptime while processes are killed.

    python -m benchmarks.governance [--only failures,cache,sharing,soak] [--seconds 60] [--soak 1200] [--seed 11]
                                    [--on KEY=VALUE] [--off KEY=VALUE] [--json FILE]

| figure | on | off |
|---|---|---|
| failures | steps have retries, a fallback and are done again after the loss of a worker | none of these |
| cache | answers to equal requests are kept | `Cache-Control: no-cache, no-store` |
| sharing | pools share devices | each model has a device of its own; between them: pools take whole devices |
| soak | one `arriero up`, whose processes are killed | |

`failures`, `cache` and `soak` run real processes with simulated engines. A server that fails one request in five, in
seeded phases, is a model too, and pools are killed at seeded times. `sharing` is the planner in simulated time, with
scenarios of `benchmarks.scheduling`. `--on` and `--off` are settings of the two sides, for what settings switch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import psutil

from app.kernel.processes import pid_file
from benchmarks.fleet_scenarios import SCENARIOS
from benchmarks.fleet_workloads import Arrivals
from benchmarks.scheduling import ABLATIONS, CONTENDERS, OWN, figures

_ROOT = Path(__file__).parent.parent
_CATALOG = """
[[models]]
name = "main:1"
use_cases = ["chat"]
slots = 4
source = { path = "/nowhere/main.gguf" }
simulated = { bytes = "600MiB", load = "500ms", tokens_per_second = 200 }

[[models]]
name = "spare:1"
use_cases = ["chat"]
slots = 4
source = { path = "/nowhere/spare.gguf" }
simulated = { bytes = "300MiB", load = "500ms", tokens_per_second = 200 }

[[models]]
name = "far:1"
use_cases = ["chat"]
slots = 8
[models.remote]
url = "http://127.0.0.1:PORT/v1"
model = "m"
allowed = true
private = true
retries = 0
"""
_SETTINGS = {
    "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}, {"name": "sim-1", "bytes": "1GiB"}]',
    "pools.models": '["main:1"]',
}
_WORKFLOW: Mapping[str, Any] = {
    "workflow": "report",
    "inputs": {"topic": {"type": "string"}},
    "steps": [
        {"id": "read", "kind": "generate", "model": "far:1", "prompt": "{{ inputs.topic }}", "max_tokens": 40},
        {"id": "write", "kind": "generate", "model": "main:1", "prompt": "{{ steps.read.output }}", "max_tokens": 60},
        {"id": "note", "kind": "transform", "cel": "steps.write.output", "needs": ["write"]},
    ],
}
_NEEDS = {"read": [], "write": ["read"], "note": ["write"]}
_OFF = {"runs.max_worker_losses": "1"}
#: Seconds between kills, and between phases in which the server fails; runs a second; the part of failing requests.
_KILLS, _PHASE, _RATE, _FAILING = 12.0, 6.0, 4.0, 0.2
#: Seconds for runs to end after the last one was submitted.
_PATIENCE = 90.0
#: Calls of the cache, and the prompts among which they are drawn by Zipf's law.
_CALLS, _PROMPTS = 120, 40
#: Seconds between probes of a soak, within which one must be answered, and between its kills.
_PROBE, _ANSWER, _SOAK_KILLS = 0.5, 5.0, 20.0
#: What a soak kills. The tree itself and the servers of data are what an operator makes redundant.
_VICTIMS = ("pool", "pool", "api", "control", "agent")


_CHUNK = {
    "id": "x",
    "object": "chat.completion.chunk",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "read"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
}
#: What the server answers.
_READ = f"data: {json.dumps(_CHUNK)}\n\ndata: [DONE]\n\n".encode()
_FAILED = json.dumps({"error": {"message": "out of memory"}}).encode()


class _FlakyServer:
    """A server in OpenAI's form, which fails one request in five in every second phase."""

    def __init__(self, seed: int) -> None:
        chance, began = random.Random(seed), time.monotonic()
        lock = threading.Lock()

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    fails = chance.random() < _FAILING and int((time.monotonic() - began) / _PHASE) % 2 == 1
                content = _FAILED if fails else _READ
                self.send_response(500 if fails else 200)
                self.send_header("Content-Type", "application/json" if fails else "text/event-stream")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True, slots=True)
class Tree:
    """A running `arriero up`."""

    data_dir: Path
    url: str

    def pids(self) -> dict[str, int]:
        """Its processes by name; pools are `pool ID`."""
        found = {
            record.name: record.pid for record in map(pid_file.find, (self.data_dir / "run").glob("*.pid")) if record
        }
        for file in (self.data_dir / "run" / "pools").glob("*.pid"):
            if (record := pid_file.find(file)) is not None:
                found[f"pool {file.stem}"] = record.pid
        return found

    def kill(self, chance: random.Random, kind: str) -> str | None:
        """Kill one of its processes of that kind; returns its name."""
        names = sorted(name for name in self.pids() if name.partition(" ")[0].partition("-")[0] == kind)
        if not names:
            return None
        name = chance.choice(names)
        with contextlib.suppress(psutil.Error, KeyError):
            psutil.Process(self.pids()[name]).send_signal(signal.SIGKILL)
        return name


@contextmanager
def up(settings: Mapping[str, str], port: int) -> Iterator[Tree]:
    """An `arriero up` with simulated engines, and a server on that port as a model."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        data, log = Path(folder, "data"), Path(folder, "up.log")
        Path(folder, "catalog.toml").write_text(_CATALOG.replace("PORT", str(port)))
        values = {"api.port": "0", "catalog.files": json.dumps([f"{folder}/catalog.toml"]), **_SETTINGS, **settings}
        options = [f"--set={key}={value}" for key, value in values.items()]
        command = [sys.executable, "-m", "app", f"--data-dir={data}", *options, "up", "--no-flower"]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=_ROOT)
        try:
            while "arriero is up" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield Tree(data, json.loads((data / "run" / "up.json").read_text())["api"])
        finally:
            process.terminate()
            process.wait(60)


def failures(seed: int, seconds: float, on: bool, settings: Mapping[str, str]) -> dict[str, float]:
    """Return how many of 1,000 steps fail for good while a server fails and pools are killed."""
    server = _FlakyServer(seed)
    more = {} if on else {"retry": {"max_attempts": 1}}
    steps = [{**step, **more, "needs": _NEEDS[step["id"]]} for step in _WORKFLOW["steps"]]
    if on:
        steps[0]["fallback"] = {"models": ["spare:1"]}
    definition, chance = {**_WORKFLOW, "steps": steps}, random.Random(seed)
    kills = random.Random(seed + 1)
    try:
        with up({**({} if on else _OFF), **settings}, server.port) as tree, httpx2.Client(base_url=tree.url) as client:
            began, ids, next_kill = time.monotonic(), [], _KILLS
            while (now := time.monotonic() - began) < seconds:
                body = {"definition": definition, "inputs": {"topic": f"topic {len(ids)}"}}
                ids.append(client.post("/v1/runs", json=body).raise_for_status().json()["id"])
                if now > next_kill:
                    tree.kill(kills, "pool")
                    next_kill += _KILLS
                time.sleep(chance.expovariate(_RATE))
            runs = ended(client, ids)
    finally:
        server.close()
    states = Counter(step["state"] for run in runs for step in run["steps"])
    done = states["succeeded"] + states["failed"]
    open_ = sum(run["state"] not in ("succeeded", "failed") for run in runs)
    times = [run["took_s"] for run in runs if run["took_s"] is not None]
    reasons = Counter(str((run["error"] or {}).get("message", ""))[:100] for run in runs if run["error"])
    for reason, count in reasons.most_common(5):
        print(f"  {count} x {reason}", file=sys.stderr)
    failed = {"failed_steps": states["failed"], "steps": done, "per_1000": 1000 * states["failed"] / max(done, 1)}
    return {**failed, "runs": len(runs), "open": open_, "mean_s": statistics.fmean(times)}


def ended(client: httpx2.Client, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the runs once they have ended, or as they are when that takes too long."""
    until = time.monotonic() + _PATIENCE
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(ids) and time.monotonic() < until:
        for id_ in [one for one in ids if one not in found]:
            run = client.get(f"/v1/runs/{id_}").raise_for_status().json()
            if run["finished_at"] is not None:
                found[id_] = run
        time.sleep(0.2)
    return [found.get(id_) or client.get(f"/v1/runs/{id_}").json() for id_ in ids]


def cache(seed: int, settings: Mapping[str, str]) -> dict[str, float]:
    """Return the mean response time of calls whose prompts come again, in milliseconds, with the cache and without."""
    chance = random.Random(seed)
    weights = [1 / (number + 1) for number in range(_PROMPTS)]
    drawn = chance.choices(range(_PROMPTS), weights, k=_CALLS)
    found: dict[str, float] = {}
    with up(settings, 1) as tree, httpx2.Client(base_url=tree.url, timeout=60) as client:
        for name, headers in (("off", {"Cache-Control": "no-cache, no-store"}), ("on", {})):
            times = []
            for prompt in drawn:
                began = time.perf_counter()
                _chat(client, f"prompt {prompt} of seed {seed}", headers).raise_for_status()
                times.append(1000 * (time.perf_counter() - began))
            found[name] = statistics.fmean(times)
    return found


def _chat(client: httpx2.Client, prompt: str, headers: Mapping[str, str]) -> httpx2.Response:
    body = {
        "model": "main:1",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 40,
        "temperature": 0,
    }
    return client.post("/v1/chat/completions", json=body, headers=dict(headers))


def sharing(seeds: Sequence[int], length: float) -> dict[str, dict[str, dict[str, float]]]:
    """Return how much of the devices' memory belongs to pools that work, and the steps served in time, in percent."""
    arrivals = Arrivals(None, length)
    contenders = {
        "shared": CONTENDERS[OWN],
        "whole devices": ABLATIONS["devices not shared"],
        "a device for each model": CONTENDERS["static partition"],
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scenario in ("zipf", "tenants"):
        found[scenario] = {}
        for name, contender in contenders.items():
            outcomes = [
                figures(contender.simulation(SCENARIOS[scenario](arrivals, seed), seed).run()) for seed in seeds
            ]
            found[scenario][name] = {
                key: statistics.fmean(one[key] for one in outcomes) for key in ("useful", "in_time")
            }
    return found


def soak(seed: int, seconds: float, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the share of calls that are answered while processes are killed, and what became of submitted runs."""
    chance, killed, lost, latencies = random.Random(seed), Counter[str](), 0, []
    probes = answered = submitted = 0
    steps = [{**_WORKFLOW["steps"][1], "prompt": "{{ inputs.topic }}"}]
    definition = {"workflow": "soak", "inputs": _WORKFLOW["inputs"], "steps": steps}
    ids: list[str] = []
    with up(settings, 1) as tree, httpx2.Client(base_url=tree.url, timeout=_ANSWER) as client:
        began, next_kill, gaps, gap_began = time.monotonic(), _SOAK_KILLS, [], None
        while (now := time.monotonic() - began) < seconds:
            if now > next_kill:
                if (name := tree.kill(chance, chance.choice(_VICTIMS))) is not None:
                    killed[name.partition(" ")[0]] += 1
                next_kill += _SOAK_KILLS
            probes += 1
            sent = time.monotonic()
            ok = _answers(client, f"probe {probes}")
            if ok:
                answered += 1
                latencies.append(time.monotonic() - sent)
                if gap_began is not None:
                    gaps.append(sent - gap_began)
                gap_began = None
            elif gap_began is None:
                gap_began = sent
            body = {"definition": definition, "inputs": {"topic": str(probes)}}
            with contextlib.suppress(httpx2.HTTPError):
                answer = client.post("/v1/runs", json=body, headers={"Idempotency-Key": f"soak-{probes}"})
                if answer.status_code in (200, 202):
                    submitted += 1
                    ids.append(answer.json()["id"])
            time.sleep(max(_PROBE - (time.monotonic() - sent), 0.0))
        runs = ended(client, ids)
        lost = sum(run["state"] != "succeeded" for run in runs)
    return {
        "seconds": seconds,
        "probes": probes,
        "uptime": answered / max(probes, 1),
        "longest_gap_s": max(gaps, default=0.0),
        "median_ms": 1000 * statistics.median(latencies) if latencies else None,
        "kills": dict(killed),
        "runs": submitted,
        "runs_not_succeeded": lost,
    }


def _answers(client: httpx2.Client, prompt: str) -> bool:
    try:
        return _chat(client, prompt, {"Cache-Control": "no-store"}).status_code == 200
    except httpx2.HTTPError:
        return False


def _settings_of(given: Sequence[str]) -> dict[str, str]:
    return dict(one.partition("=")[::2] for one in given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="failures,cache,sharing,soak")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for `failures`")
    parser.add_argument("--soak", type=float, default=1200.0, help="seconds of the soak")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--on", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--off", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    on, off, only = _settings_of(given.on), _settings_of(given.off), given.only.split(",")
    results: dict[str, Any] = {}
    if "failures" in only:
        with_, without = failures(given.seed, given.seconds, True, on), failures(given.seed, given.seconds, False, off)
        results["failures"] = {"on": with_, "off": without}
        print(f"failed steps per 1,000: off {without['per_1000']:.1f}, on {with_['per_1000']:.1f}", flush=True)
    if "cache" in only:
        results["cache"] = times = cache(given.seed, on)
        print(f"mean response: off {times['off']:.0f} ms, on {times['on']:.0f} ms", flush=True)
    if "sharing" in only:
        results["sharing"] = sharing(range(given.seed, given.seed + 3), 1200.0)
        for scenario, rows in results["sharing"].items():
            shown = ", ".join(
                f"{name} {row['useful']:.1f} % ({row['in_time']:.1f} % in time)" for name, row in rows.items()
            )
            print(f"{scenario}: bytes of pools that work, of all: {shown}", flush=True)
    if "soak" in only:
        results["soak"] = found = soak(given.seed, given.soak, on)
        print(f"soak: {found['uptime']:.2%} of {found['probes']} calls answered; {found}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
