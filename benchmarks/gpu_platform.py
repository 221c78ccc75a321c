"""
What is verified of GPUs through the whole platform: memory that comes back, throughput, and 1,000 documents.

Each function with a target is a section of `benchmarks/gpu_verify.py`, and runs in a process of its own.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from app.devices.device import MeasuredDevice
from app.devices.inventory import Devices
from app.kernel.sections.fleet import FleetSettings
from benchmarks import installations
from benchmarks.engine_runs import text
from benchmarks.gpu_devices import ROOT, environment, gpus
from benchmarks.gpu_report import GIB, Findings, Target, size
from benchmarks.installations import Up

HOST = "verify"
MODEL = "alpha:1"
TOPICS = ("account", "delivery", "payment", "product", "thanks")
#: Every answer is computed: the response cache gives none and keeps none.
UNCACHED = {"Cache-Control": "no-cache, no-store"}
#: Cells of a slot, in measurements of speed.
CELLS = 512
#: Bytes of the cache with which a GPU is filled, so that its driver's context does not decide what fits.
FILLED = 6 * GIB
#: Part of a model's reservation that the next one finds on a device besides it.
SPARE = 0.3
#: Seconds for any condition.
PATIENCE = 180.0
_ENTRY = """
[[models]]
name = "{name}"
use_cases = ["complete", "chat"]
source = {{ path = {path} }}
slots = {slots}
context = {context}
engine = {{ {engine} }}
pools = {{ only = {only}, max = {most} }}
"""


T = TypeVar("T")


def until(condition: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """Poll a condition every 20 ms until it is true, and return its value."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"not true within {seconds:g} s")


class Platform:
    """A running `arriero up` on the devices of a target."""

    def __init__(self, up: Up) -> None:
        self.data = up.data
        self._client = httpx2.Client(base_url=up.url, timeout=PATIENCE, trust_env=False, headers=UNCACHED)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str) -> Any:
        """Return the JSON of a resource."""
        return self._client.get(path).raise_for_status().json()

    def submit(self, definition: dict[str, Any], **inputs: Any) -> str:
        """Submit a run, and return its id."""
        answer = self._client.post("/v1/runs", json={"definition": definition, "inputs": inputs})
        return str(answer.raise_for_status().json()["id"])

    def ask(self, model: str, tokens: int = 2) -> str:
        """Submit a run of one text."""
        step = {"id": "write", "kind": "generate", "model": model, "prompt": "The sea", "chat": False}
        step |= {"max_tokens": tokens, "retry": {"max_attempts": 20, "delay": "100ms"}}
        return self.submit({"workflow": "ask", "steps": [step]})

    def until_ended(self, run_id: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Wait until a run has ended, and return it."""
        found: dict[str, Any] = until(
            lambda: one if (one := self.get(f"/v1/runs/{run_id}"))["state"] in _FINAL else None, seconds
        )
        if found["state"] != "succeeded":
            raise RuntimeError(f"run {run_id} is {found['state']}: {found.get('error')}")
        return found

    def chat(self, prompt: str, tokens: int) -> int:
        """Ask for an answer, and return its number of tokens."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
        answer = self._client.post("/v1/chat/completions", json={**body, "max_tokens": tokens, "temperature": 0})
        return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

    def pool(self, model: str) -> dict[str, Any] | None:
        """Return the serving pool of a model."""
        pools = self.get("/v1/pools")["pools"]
        return next((one for one in pools if one["model"] == model and one["state"] == "serving"), None)

    def serving(self, model: str) -> dict[str, Any]:
        """Return the pool of a model, after a run on it."""
        self.until_ended(self.ask(model))
        return until(lambda: self.pool(model))

    def ended(self, id_: str) -> dict[str, Any]:
        """Wait until a pool has ended and its bytes are released, and return it."""

        def found() -> dict[str, Any] | None:
            pools = self.get("/v1/pools?ended=true")["pools"]
            return next((one for one in pools if one["id"] == id_ and one["ended_at"]), None)

        return until(found)

    def load_began(self, pool: dict[str, Any]) -> datetime:
        """When the pool began to load its model."""
        lines = (self.data / "logs" / f"pool.{pool['id']}.log").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return datetime.fromisoformat(next(one["timestamp"] for one in events if one["event"] == "model_loading"))

    def decode_seconds(self) -> float:
        """Seconds that the pools have spent in decodes."""
        total = 0.0
        for file in (self.data / "metrics").glob("*.json"):
            for target in json.loads(file.read_text())[0]["targets"]:
                page = httpx2.get(f"http://{target}/metrics", trust_env=False, timeout=10).text
                lines = (line for line in page.splitlines() if "decode_seconds_total" in line and line[0] != "#")
                total += sum(float(line.rpartition(" ")[2]) for line in lines)
        return total


_FINAL = {"succeeded", "failed", "cancelled"}


@contextmanager
def platform(
    target: Target, names: Sequence[str], devices: Sequence[MeasuredDevice], *, slots: int, context: int,
    capacity: int = 0, engine: str = "",
) -> Iterator[Platform]:  # fmt: skip
    """Run the platform with these models on these devices, of which pools may reserve `capacity` bytes each."""
    from workers.agent import inventory

    only = json.dumps([inventory.id_of(HOST, device) for device in devices])
    entry = {"path": json.dumps(target.model), "slots": slots, "context": context, "engine": engine, "only": only}
    catalog = "".join(_ENTRY.format(name=name, most=1, **entry) for name in names)
    options = [f"fleet.host={HOST}", "pools.models=[]", "fleet.heartbeat_timeout=10s"]
    if target.software:
        sizes = [capacity or one for one in target.software]
        options.append(f"fleet.software={json.dumps(sizes)}")
    elif capacity:
        options.append(f"fleet.head_room={min(device.total for device in devices) - capacity}")
    with (
        installations.up(threads=target.threads, slots=slots, context=context, options=options, catalog=catalog) as up,
        closing(Platform(up)) as found,
    ):
        yield found


# ---- memory that comes back ------------------------------------------------------------------------------------------


def memory(target: Target, findings: Findings) -> None:
    """More models than fit: eviction, kill and freeze, and when the next load begins."""
    devices = gpus(target)[:2]
    slots, context, needed = _filling(target)
    names = [f"model{number}:1" for number in range(len(devices) + 1)]
    findings.figure("each model", f"{size(needed)} of a device that has {size(needed * (1 + SPARE))} for pools")
    with platform(
        target, names, devices, slots=slots, context=context, capacity=int(needed * (1 + SPARE)),
        engine="batch = 32, ubatch = 32" if target.software else "",
    ) as tree:  # fmt: skip
        first = [tree.serving(name) for name in names[:-1]]
        own = {pool["id"]: {one for one in pool["devices"] if one != "cpu"} for pool in first}
        findings.check("each pool has a device of its own", len(set(map(frozenset, own.values()))) == len(first))
        with _free_memory(target, devices) as free:
            begun = time.perf_counter()
            third = tree.serving(names[-1])
            whole = time.perf_counter() - begun
        gone = [pool for pool in first if own[pool["id"]] & set(third["devices"])]
        ended = tree.ended(gone[0]["id"])
        back = datetime.fromisoformat(ended["ended_at"])
        wait = (tree.load_began(third) - back).total_seconds()
        findings.figure("eviction: from the request of the next model to its answer", f"{whole:.2f} s")
        findings.figure("eviction: from bytes back to the next load", f"{wait:.3f} s")
        findings.check("evicted: the bytes are back before the next load", wait >= 0, f"{wait:.3f} s")
        if not target.software:
            findings.figure("most free memory of the devices meanwhile", free())
        _fault(tree, findings, third, names[-1], "killed", signal.SIGKILL)
        _fault(tree, findings, until(lambda: tree.pool(names[-1])), names[-1], "frozen", signal.SIGSTOP)


def _fault(tree: Platform, findings: Findings, pool: dict[str, Any], name: str, how: str, number: int) -> None:
    """A pool is killed or frozen in the middle of a text."""
    run_id = tree.ask(name, tokens=24)
    until(lambda: tree.get(f"/v1/runs/{run_id}")["state"] == "running")
    begun = time.perf_counter()
    os.kill(pool["pid"], number)
    ended = tree.ended(pool["id"])
    back = time.perf_counter() - begun
    tree.until_ended(run_id)
    whole = time.perf_counter() - begun
    after = until(lambda: tree.pool(name))
    wait = (tree.load_began(after) - datetime.fromisoformat(ended["ended_at"])).total_seconds()
    findings.figure(f"{how}: until its bytes are back, until its run has succeeded", f"{back:.2f} s, {whole:.2f} s")
    findings.check(
        f"{how}: the bytes are back before the next load", wait >= 0 and after["id"] != pool["id"], f"{wait:.3f} s"
    )


def _filling(target: Target) -> tuple[int, int, int]:
    """Slots and context of a model that fills most of a device, and the bytes that it needs there."""
    from app.catalog import header
    from app.footprint import closed_form
    from app.footprint.configuration import LoadConfiguration

    read = header.read(Path(target.model))
    slots, context = 1, 256
    made = LoadConfiguration(context=context, sequences=slots, gpu_layers=-1, batch=32, ubatch=32)
    if not target.software:
        context = min(read.context_length or 4096, 8192)
        one = closed_form.closed_form(read, LoadConfiguration(context=context, sequences=1, gpu_layers=-1), gpus=1)
        slots = min(max(FILLED // max(one.shares[-1].cache, 1), 1), 64)
        made = LoadConfiguration(context=slots * context, sequences=slots, gpu_layers=-1)
    process = replace(closed_form.DEFAULT_PROCESS, context=0) if target.software else closed_form.DEFAULT_PROCESS
    footprint = closed_form.closed_form(read, made, gpus=1, process=process)
    return slots, context, footprint.reserved()[0]


@contextmanager
def _free_memory(target: Target, devices: Sequence[MeasuredDevice]) -> Iterator[Callable[[], str]]:
    """Sample the free memory of devices; the function tells the most of each."""
    names = {device.name for device in devices}
    most: dict[str, int] = {}
    finished = threading.Event()

    def sample() -> None:
        with closing(Devices(FleetSettings(software=target.software))) as measuring:
            while not finished.wait(0.05):
                for one in measuring.measure().devices:
                    if one.name in names:
                        most[one.name] = max(most.get(one.name, 0), one.free)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield lambda: ", ".join(f"{name} {size(value)}" for name, value in sorted(most.items()))
    finally:
        finished.set()
        thread.join()


# ---- speed ----------------------------------------------------------------------------------------------------------


def throughput(target: Target, findings: Findings) -> None:
    """The whole platform over HTTP against the bare engine: the same chats, as many at a time."""
    device, ratios = gpus(target)[:1], []
    rounds = 1 if target.software else _ROUNDS
    many = [one for one in target.streams if one > 1][:3] or list(target.streams)
    with platform(target, [MODEL], device, slots=max(many), context=CELLS) as tree:
        tree.serving(MODEL)
        _measure_chats(lambda prompt: tree.chat(prompt, target.tokens), max(many), 1, seed=1_000)  # warm
        rates = [_measure_chats(lambda p: tree.chat(p, target.tokens), n, rounds, seed=2_000) for n in many]
    for streams, own in zip(many, rates, strict=True):
        spec = {"model": target.model, "slots": max(many), "streams": streams, "tokens": target.tokens}
        spec["rounds"] = rounds
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_platform", json.dumps({**spec, "threads": target.threads})],
            env=environment(device), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        bare = float(done.stdout.strip().splitlines()[-1])
        ratios.append(own / bare)
        findings.figure(
            f"{streams} chats at a time", f"{own:,.1f} tokens/s; the bare engine {bare:,.1f} ({ratios[-1]:.2f} times)"
        )
    findings.check("the platform has 0.97 of the bare engine", min(ratios) >= 0.97, f"at the least {min(ratios):.2f}")


#: Chats of each stream in a measurement.
_ROUNDS = 4


def _measure_chats(chat: Callable[[str], int], streams: int, rounds: int, seed: int) -> float:
    """Tokens per second, with so many chats at a time."""
    prompts = [f"{seed + n} {text(seed + n, 60)}. Go on." for n in range(streams * rounds)]
    with ThreadPoolExecutor(streams) as threads:
        begun = time.perf_counter()
        written = sum(threads.map(chat, prompts))
        return written / (time.perf_counter() - begun)


def bare_chats(spec: dict[str, Any]) -> float:
    """The same chats on an engine in this process."""
    from app.inference.requests import ChatMessage, GenerateRequest, PriorityClass, Sampling
    from workers.engine.engine import LlamaEngine
    from workers.engine.options import EngineOptions

    slots = spec["slots"]
    options = EngineOptions(slots=slots, context=slots * CELLS, gpu_layers=-1, threads=spec["threads"], vectors=False)
    engine = LlamaEngine(Path(spec["model"]), options)

    def chat(prompt: str) -> int:
        request = GenerateRequest(
            messages=(ChatMessage("user", prompt),), max_tokens=spec["tokens"], sampling=Sampling(temperature=0),
            priority=PriorityClass.INTERACTIVE,
        )  # fmt: skip
        return engine.generate(request).result().tokens_out

    try:
        _measure_chats(chat, slots, 1, seed=1_000)
        return _measure_chats(chat, spec["streams"], spec["rounds"], seed=2_000)
    finally:
        engine.close()


def documents(target: Target, findings: Findings) -> None:
    """Many documents through a workflow that chooses a topic for each: time, and how much of it the device works."""
    device = gpus(target)[:1]
    slots = max(target.streams)
    with (ROOT / "benchmarks/messages/held_out.csv").open(newline="") as file:
        messages = [row["message"] for row in csv.DictReader(file)]
    many = [f"{n}: {message}" for n, message in zip(range(target.documents), itertools.cycle(messages), strict=False)]
    body = {
        "kind": "generate", "model": MODEL, "chat": False, "max_tokens": 8, "sampling": {"temperature": 0},
        "prompt": f"Topics: {', '.join(TOPICS)}\n\nMessage: {{{{ item }}}}\nTopic:",
        "output": {"schema": {"enum": list(TOPICS)}},
    }  # fmt: skip
    step = {"id": "topics", "kind": "map", "over": "inputs.messages", "max_parallel": 4 * slots, "step": body}
    definition = {"workflow": "sort", "inputs": {"messages": {"type": "array"}}, "steps": [step]}
    with platform(target, [MODEL], device, slots=slots, context=CELLS) as tree:
        tree.serving(MODEL)
        tree.until_ended(tree.submit(definition, messages=many[: 2 * slots]), 600)  # warm
        busy: list[float] = []
        with _utilisation(target, device, busy):
            before, begun = tree.decode_seconds(), time.perf_counter()
            run = tree.until_ended(tree.submit(definition, messages=many), 1_200)
            wall, decoding = time.perf_counter() - begun, tree.decode_seconds() - before
    found = run["output"]["topics"]
    findings.figure(f"{len(many):,} documents", f"{wall:.1f} s, {len(many) / wall:,.1f} documents/s, {slots} slots")
    findings.check("each has a topic", len(found) == len(many) and set(found) <= set(TOPICS), f"{len(found):,}")
    findings.figure("the engine is in decodes", f"{decoding / wall:.1%} of the time")
    if busy:
        mean = sum(busy) / len(busy)
        findings.check("utilisation by the driver is 90 % or more", mean >= 0.9, f"{mean:.1%} of {len(busy)} samples")
    else:
        findings.skip("utilisation by the driver: it reports none for this device")
        findings.check(
            "the engine is in decodes for 90 % of the time", decoding / wall >= 0.9, f"{decoding / wall:.1%}"
        )


@contextmanager
def _utilisation(target: Target, devices: Sequence[MeasuredDevice], found: list[float]) -> Iterator[None]:
    """Sample how much the device computes, by its driver."""
    finished = threading.Event()

    def sample() -> None:
        with closing(Devices(FleetSettings(software=target.software))) as measuring:
            while not finished.wait(0.2):
                own = [one for one in measuring.measure().devices if one.uuid == devices[0].uuid]
                found.extend(one.utilisation for one in own if one.utilisation is not None)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


if __name__ == "__main__":
    print(bare_chats(json.loads(sys.argv[1])))
