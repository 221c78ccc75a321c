"""
What is verified of GPUs without the platform: how they are seen, pinned, filled and shared, and how fast they are.

Each function is a section of `benchmarks/gpu_verify.py`, and runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2

from app.devices import llama_build, pci, pinning
from app.devices.device import HardwareKind, MeasuredDevice
from app.devices.inventory import Devices
from app.kernel.sections.fleet import FleetSettings
from benchmarks import engine_runs
from benchmarks.gpu_report import Findings, Target, size
from benchmarks.installations import free_port

ROOT = Path(__file__).parents[1]
#: Cells of each request: a prompt of 100 tokens, and what is written.
CELLS = 512
_PROMPT = (
    "Long ago, before there were any roads in the mountains, a man walked from village to village with his llamas,"
)


def gpus(target: Target) -> list[MeasuredDevice]:
    """The devices that are verified: those on which the installed llama.cpp computes."""
    with closing(Devices(FleetSettings(software=target.software))) as devices:
        measured = devices.measure().devices
    found = [one for one in measured if one.kind is HardwareKind.GPU and one.backend in llama_build.backends()]
    return [one for one in found if one.software == bool(target.software)]


def environment(devices: Sequence[MeasuredDevice]) -> dict[str, str]:
    """The environment of a process that sees these devices and no other."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **pinning.environment(devices)}


def listed(devices: Sequence[MeasuredDevice]) -> list[dict[str, Any]]:
    """What llama.cpp lists in a process that is pinned to these devices."""
    done = subprocess.run(
        [sys.executable, "-m", "workers.programs", "gpus"],
        env=environment(devices), cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def seen(target: Target, findings: Findings) -> None:
    """The driver's view of each device, and llama.cpp's; pinning by identity, alone and in another order."""
    done = subprocess.run(
        [sys.executable, "-m", "app", f"--set=fleet.software={json.dumps(target.software)}", "gpu", "check", "--json"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(f"arriero gpu check: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    for one in json.loads(done.stdout)["findings"]:
        if not one["ok"]:
            findings.check(f"`arriero gpu check`: {one['what']}", False, one["mend"])
    devices = gpus(target)
    findings.check("there is a device", bool(devices), ", ".join(one.name for one in devices))
    for gpu in devices:
        own = listed([gpu])
        findings.figure(f"{gpu.name}", f"{gpu.model}, {gpu.uuid}, driver {gpu.driver or 'unknown'}")
        one = own[0] if own else {"total": 0, "free": 0, "pci": "", "name": "nothing"}
        same = len(own) == 1 and (not gpu.pci or not one["pci"] or gpu.parent or one["pci"] == gpu.pci)
        findings.check(f"pinned to {gpu.name}, llama.cpp sees it and no other", bool(same), one["name"])
        if gpu.software:
            findings.figure(f"{gpu.name}: declared, by llama.cpp", f"{size(gpu.total)}, {size(one['total'])}")
            continue
        findings.figure(f"{gpu.name}: total by its driver, by llama.cpp", f"{size(gpu.total)}, {size(one['total'])}")
        findings.figure(f"{gpu.name}: free by its driver, by llama.cpp", f"{size(gpu.free)}, {size(one['free'])}")
        apart = abs(gpu.total - one["total"]) / gpu.total
        findings.check(f"{gpu.name}: both totals are within 2 %", apart <= 0.02, f"{apart:.2%}")
    if len(devices) > 1 and all(gpu.pci and not gpu.parent for gpu in devices):
        addresses = [one["pci"] for one in listed(devices[::-1])]
        expected = [gpu.pci for gpu in reversed(devices)]
        findings.check("the order of pinning is kept", addresses == expected, ", ".join(addresses))
    findings.check("without a device, llama.cpp sees none", listed([]) == [])
    if not any(gpu.uuid.startswith(("GPU-", "MIG-")) for gpu in devices):
        findings.skip("NVML: no NVIDIA driver measures these devices")
    if not any(gpu.parent for gpu in devices):
        findings.skip("MIG: no GPU here is partitioned")
    if not pci.gpus():
        findings.skip("PCI addresses: the bus lists no GPU (software devices have none, and a container may hide it)")


def footprints(target: Target, findings: Findings) -> None:
    """The dry run and the closed form against the buffers of a real load; the rest is the driver's context."""
    from app.catalog import header
    from app.footprint.footprint import MIB
    from benchmarks import gpu_footprints
    from workers.engine.bindings import llama, native, probe

    devices = gpus(target)
    path = Path(target.model)
    before = [gpu.free for gpu in devices]
    native.start()
    count = len(native.gpus())
    made = gpu_footprints.configurations(count)
    options = probe.options_of(made["one device"])
    model = llama.LlamaModel(path, options)
    context = llama.Context(model, options)
    context.decode([(0, 0, model.tokenize("A long walk", add_special=True, parse_special=False), True)])
    buffers = [one for one in probe._buffers(context.pointer) if one["gpu"] == 0]
    own = sum(one[part] for one in buffers for part in ("model", "context", "compute"))
    if devices[0].software:
        findings.skip("the size of a driver's context: a software device has none that could be measured")
    else:
        taken = before[0] - gpus(target)[0].free
        findings.figure("context of the driver, and its other memory", f"{size(taken - own)} beside {size(own)}")
    context.close()
    model.close()
    read, exact, worst, under, total = header.read(path), 0, 0.0, 0, 0
    for label, configuration in list(made.items())[: target.configurations]:
        for row in gpu_footprints.rows(path, configuration, count):
            total += 1
            exact += row["dry"] == row["real"]
            worst = max(worst, row["dry"] / row["real"] - 1, key=abs)
            under += row["real"] > row["reserved"]
            findings.figure(f"{label}: {row['text'].split(' | ')[0]}", _compared(row, MIB))
    findings.figure("model", f"{path.name}, {read.architecture}, {size(path.stat().st_size)}")
    findings.check("dry run = load, to the byte", exact == total, f"{exact} of {total}; largest error {worst:+.1%}")
    findings.check("the dry run is never too low", worst >= 0, f"{worst:+.1%}")
    findings.check("the closed form and its margin are never too low", not under, f"{under} of {total} too low")


def _compared(row: dict[str, Any], mib: int) -> str:
    return (
        f"load {row['real'] / mib:,.2f} MiB, dry run {row['dry'] - row['real']:+,} B, "
        f"closed form with margin {(row['reserved'] - row['real']) / mib:+,.1f} MiB"
    )


# ---- speed ----------------------------------------------------------------------------------------------------------


def spec_of(target: Target, streams: int, **more: Any) -> dict[str, Any]:
    """One measurement of the bare engine, of `benchmarks/engine_runs.py`."""
    return {
        "runner": "engine", "workload": "distinct", "model": target.model, "streams": streams,
        "requests": _requests(target, streams), "tokens": target.tokens, "context": streams * CELLS,
        "threads": target.threads, "reuse": False, "warm": streams,
        "options": {"gpu_layers": -1, "vectors": False}, **more,
    }  # fmt: skip


def _requests(target: Target, streams: int) -> int:
    """Requests of a measurement: one for each stream, and some more of a single one where that takes no minutes."""
    return streams if target.software else max(streams, 4)


def started(spec: dict[str, Any], devices: Sequence[MeasuredDevice]) -> subprocess.Popen[str]:
    """A process that measures, pinned to these devices."""
    command = [sys.executable, "-m", "benchmarks.engine_runs", json.dumps(spec)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(devices), cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def ended(process: subprocess.Popen[str]) -> engine_runs.Figures:
    """The figures of such a process."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the engine ended with exit code {process.returncode}")
    found: engine_runs.Figures = json.loads(out.strip().splitlines()[-1])
    return found


def speed(target: Target, findings: Findings) -> None:
    """Tokens a second of the bare engine at several streams, beside llama-server with the same prompts."""
    first = gpus(target)[:1]
    if not target.server:
        findings.skip(
            "llama-server: give its program, built from the same source (deploy/gpu/verify.sh --build-server)"
        )
    for streams in target.streams:
        own = ended(started(spec_of(target, streams), first))["tokens_per_s"]
        text = f"{own:,.1f} tokens/s"
        if target.server:
            peer = _server_rate(target, streams, first)
            text += f"; llama-server {peer:,.1f} ({own / peer:.2f} times)"
        findings.figure(f"{streams} streams", text)


def _server_rate(target: Target, streams: int, devices: Sequence[MeasuredDevice]) -> float:
    """Tokens a second of llama-server, with a client for each stream."""
    port = free_port()
    command = [
        target.server, "-m", target.model, "-ngl", "999", "-np", str(streams), "-c", str(streams * CELLS),
        "-t", str(target.threads), "--port", str(port), "--host", "127.0.0.1", "--no-webui",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment(devices), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False) as client:
            while not _is_healthy(client):
                if process.poll() is not None:
                    raise RuntimeError(f"llama-server ended with exit code {process.returncode}")
                time.sleep(0.1)

            def one(prompt: str, tokens: int) -> int:
                body = {
                    "prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
                }  # fmt: skip
                answer = client.post("/completion", json=body).raise_for_status()
                return int(answer.json()["tokens_predicted"])

            requests = _requests(target, streams)
            with ThreadPoolExecutor(requests) as threads:
                list(threads.map(lambda n: one(f"warm {n}", 2), range(streams)))
                begun = time.perf_counter()
                written = sum(threads.map(lambda text: one(text, target.tokens), engine_runs.distinct(requests)))
                return written / (time.perf_counter() - begun)
    finally:
        process.kill()
        process.wait()


def _is_healthy(client: httpx2.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx2.TransportError:
        return False


def side_by_side(target: Target, findings: Findings) -> None:
    """Two engines at once, on two devices where there are two: each alone first, then both."""
    devices = gpus(target)
    pair = [devices[0], devices[1 if len(devices) > 1 else 0]]
    streams = min(8, max(target.streams))
    spec = spec_of(target, streams, waits=True)
    alone = [_at_once(spec, [device])[0] for device in dict.fromkeys(pair)]
    both = _at_once(spec, pair)
    names = " and ".join(device.name for device in dict.fromkeys(pair))
    findings.figure(f"alone on {names}", ", ".join(f"{rate:,.1f}" for rate in alone) + f" tokens/s, {streams} streams")
    findings.figure("both at once", f"{both[0]:,.1f} and {both[1]:,.1f} tokens/s")
    ratio = sum(both) / (sum(alone) * 2 / len(alone))
    findings.figure("both, over the sum of each alone", f"{ratio:.2f}")
    if len(devices) == 1:
        findings.skip("two pools on two GPUs: there is one; the two engines shared it")
    elif devices[0].software:
        findings.skip("that two GPUs do not slow each other down: both devices are the same processor")
    else:
        findings.check("two devices do not slow each other down", ratio >= 0.95, f"{ratio:.2f}")


def _at_once(spec: dict[str, Any], devices: Sequence[MeasuredDevice]) -> list[float]:
    """Tokens a second of an engine on each device, which begin in the same moment."""
    processes = [started(spec, [device]) for device in devices]
    try:
        for process in processes:
            assert process.stdout is not None
            if not any(line.strip() == "ready" for line in process.stdout):  # after the lines of its log
                raise RuntimeError("the engine did not start")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return [ended(process)["tokens_per_s"] for process in processes]
    finally:
        for process in processes:
            process.kill()


def preemption(target: Target, findings: Findings) -> None:
    """An interactive request takes the only slot of a long text, whose cache goes to RAM and comes back."""
    from app.inference.requests import GenerateRequest, PriorityClass, Sampling
    from workers.engine.engine import LlamaEngine
    from workers.engine.options import EngineOptions

    greedy = Sampling(temperature=0, ignore_end=True)
    options = EngineOptions(slots=1, context=4096, gpu_layers=-1, threads=target.threads, reuse=False, vectors=False)
    engine = LlamaEngine(Path(target.model), options)
    tokens, rounds = max(target.tokens, 24), 1 if target.software else 3
    long = GenerateRequest(prompt=_PROMPT, max_tokens=tokens, sampling=greedy, priority=PriorityClass.BATCH)
    urgent = GenerateRequest(prompt="A walk", max_tokens=4, sampling=greedy, priority=PriorityClass.INTERACTIVE)
    try:
        engine.generate(urgent).result()  # compiles kernels
        begun = time.perf_counter()
        alone = engine.generate(long).result().text
        undisturbed = time.perf_counter() - begun
        free = engine.generate(urgent).result()
        for round_ in range(rounds):
            half = threading.Event()
            pieces: list[str] = []

            def note(piece: str, half: threading.Event = half, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                if len(pieces) >= tokens // 3:
                    half.set()

            begun = time.perf_counter()
            ticket = engine.generate(long, note)
            half.wait()
            kept: list[int] = []

            def see(_: str, kept: list[int] = kept) -> None:
                kept.append(engine.metrics().parked_bytes)

            answer = engine.generate(urgent, see).result()
            whole = ticket.result()
            added = time.perf_counter() - begun - undisturbed
            first = answer.time_to_first.total_seconds() * 1000
            findings.figure(
                f"round {round_ + 1}",
                f"first token after {first:.1f} ms (a free slot: {free.time_to_first.total_seconds() * 1000:.1f} ms), "
                f"{size(max(kept, default=0))} in RAM; the long text ended {added * 1000:+.0f} ms later",
            )
            findings.check("the long text is the same", whole.text == alone, f"{len(alone)} characters")
        metrics = engine.metrics()
        findings.check(
            "each was parked and resumed", (metrics.parked, metrics.resumed) == (rounds, rounds),
            f"{metrics.parked} parked, {metrics.resumed} resumed",
        )  # fmt: skip
    finally:
        engine.close()
