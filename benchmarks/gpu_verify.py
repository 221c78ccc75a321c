"""
Verifies Arriero on the GPUs of this machine, and writes a report: everything that tests without a GPU cannot show.

    python -m benchmarks.gpu_verify [--model FILE] [--server PROGRAM] [--minutes 24] [--out FOLDER]
    GGML_VK_VISIBLE_DEVICES=0,0 .venv-gpu/bin/python -m benchmarks.gpu_verify --software 400MiB,400MiB --small

`deploy/gpu/verify.sh` calls it on a machine without network. It needs no other program and downloads nothing.

Each section is a process of its own with a part of the time. One that fails, or runs out of time, stops no other; what
it found until then is in the report. The report is `verify-BACKEND-DEVICE.md`, and `.json` beside it. The exit code is
1 when something did not hold or did not run to its end.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

from app.devices import llama_build
from app.devices.device import MeasuredDevice
from app.kernel.units import sizes
from benchmarks import gpu_devices, gpu_platform, gpu_report
from benchmarks.engine_runs import model_path
from benchmarks.gpu_report import Findings, Section, Target

OUT = Path(__file__).parent / "results-gpu"
#: Seconds for a section to stop what it has started.
_GRACE = 30.0
#: Lines of its output that are shown after a failure.
_SHOWN = 25


@dataclass(frozen=True, slots=True)
class Plan:
    """A section, and its part of the time."""

    title: str
    run: Callable[[Target, Findings], None]
    #: Of all parts.
    part: int
    #: Whether its process sees the devices. Others start processes that do.
    pinned: bool = False


SECTIONS = {
    "seen": Plan("Devices: as their driver and llama.cpp see them", gpu_devices.seen, 8),
    "footprints": Plan("Dry run against real loads", gpu_devices.footprints, 14, pinned=True),
    "memory": Plan("Memory that comes back: eviction, kill, freeze", gpu_platform.memory, 20),
    "preemption": Plan("Preemption: a cache that is parked and resumed", gpu_devices.preemption, 8, pinned=True),
    "speed": Plan("Tokens a second of the bare engine", gpu_devices.speed, 22),
    "side_by_side": Plan("Two engines side by side", gpu_devices.side_by_side, 10),
    "throughput": Plan("The whole platform against the bare engine", gpu_platform.throughput, 12),
    "documents": Plan("Documents through a workflow", gpu_platform.documents, 16),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sections, and write the report. Returns the exit code."""
    asked = _parser().parse_args(arguments)
    target = _target(asked)
    if asked.section:
        return _run_here(asked.section, target, asked.to)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # so that the section is stopped, too
    devices = gpu_devices.gpus(target)
    if not devices:
        print(f"llama.cpp {llama_build.build()} computes on no GPU here; see: arriero gpu check", file=sys.stderr)
        return 2
    began, limit = datetime.now(UTC), time.monotonic() + 60 * asked.minutes
    chosen = {name: SECTIONS[name] for name in asked.only.split(",")} if asked.only else SECTIONS
    sections: list[Section] = []
    name = f"verify-{devices[0].backend}-{_file_name(devices[0].model)}"
    asked.out.mkdir(parents=True, exist_ok=True)
    for key, plan in chosen.items():
        parts = sum(one.part for later, one in chosen.items() if later not in {done.name for done in sections})
        seconds = max((limit - time.monotonic()) * plan.part / parts, 1.0)
        sections.append(_run(key, plan, target, devices if plan.pinned else [], seconds))
        print(
            f"{key}: {sections[-1].state}, {sections[-1].seconds:.0f} of {seconds:.0f} s", file=sys.stderr, flush=True
        )
        head = [
            ("devices", f"{len(devices)} x {devices[0].model} ({devices[0].backend.label})"),
            ("machine", f"{os.cpu_count()}-core {platform.machine().replace('_', '-')}, {platform.system()}"),
            ("versions", f"{_versions()}, driver {devices[0].driver or 'unknown'}"),
            ("model", Path(target.model).name),
            ("date", f"{began:%Y-%m-%d}, {(datetime.now(UTC) - began).total_seconds() / 60:.1f} minutes"),
            ("command", f"`{_command(asked)}`"),
        ]
        # after each section: what is known when the machine is taken away is kept
        names = {"model": Path(target.model).name, "server": Path(target.server).name}
        document = {
            "head": dict(head),
            "target": asdict(target) | names,
            "sections": [asdict(one) for one in sections],
        }
        (asked.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (asked.out / f"{name}.md").write_text(gpu_report.markdown(head, sections))
    print(asked.out / f"{name}.md")
    return int(any(one.state != "ok" or not all(check[1] for check in one.checks) for one in sections))


def _run(key: str, plan: Plan, target: Target, devices: Sequence[MeasuredDevice], seconds: float) -> Section:
    """Run a section in a process, and stop it and all that it started when its time is over."""
    begun = time.monotonic()
    environment = gpu_devices.environment(devices)
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "section.json"), Path(folder, "log")
        command = [sys.executable, "-m", "benchmarks.gpu_verify", "--section", key, "--to", str(file)]
        command += ["--target", json.dumps(asdict(target))]
        with log.open("wb") as out:
            process = psutil.Popen(command, cwd=gpu_devices.ROOT, env=environment, stdout=out, stderr=out)
            code = None
            try:
                code = process.wait(seconds)
            except psutil.TimeoutExpired:
                process.send_signal(signal.SIGUSR1)  # it prints where it is
            finally:
                if code is None:
                    _stop(process)
        section = gpu_report.read(file, key, plan.title)
        section.seconds = time.monotonic() - begun
        if code is not None:
            section.state = "ok" if code == 0 else "failed"
        if code != 0:
            lines = [line for line in log.read_text(errors="replace").splitlines() if "site-packages" not in line]
            section.failure = "\n".join(
                [*([f"exit code {code}"] if code is not None else []), *lines[-_SHOWN:]]
            ).replace(str(gpu_devices.ROOT), ".")
    return section


def _stop(process: psutil.Popen) -> None:
    """End a section, which ends what it has started; then kill what is left."""
    tree = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(tree, _GRACE)
    for one in left:
        with suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(left, _GRACE)


def _run_here(key: str, target: Target, file: Path) -> int:
    """Run a section in this process. Returns its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # what it has started is stopped on the way
    faulthandler.register(signal.SIGUSR1)
    try:
        SECTIONS[key].run(target, Findings(file))
    except Exception:  # noqa: BLE001 the outermost frame of the section: the failure goes into the report
        traceback.print_exc()
        return 1
    return 0


def _target(asked: argparse.Namespace) -> Target:
    if asked.target:
        return Target.of_json(asked.target)
    software = tuple(sizes.parse(part) for part in asked.software.split(",")) if asked.software else ()
    chosen = Target(str(asked.model.resolve()), software=software, threads=asked.threads)
    if asked.small:
        chosen = Target(
            chosen.model, software, streams=(1, 2), tokens=8, documents=16, configurations=5, threads=asked.threads
        )
    values = asdict(chosen) | {"server": str(asked.server.resolve()) if asked.server else ""}
    if asked.documents:
        values["documents"] = asked.documents
    if asked.streams:
        values["streams"] = tuple(int(part) for part in asked.streams.split(","))
    return Target(**values)


def _versions() -> str:
    return f"Arriero {metadata.version('arriero')}, llama.cpp {llama_build.build()}, Python {platform.python_version()}"


def _command(asked: argparse.Namespace) -> str:
    """The command as typed, without folders of this machine."""
    words = [Path(word).name if "/" in word else word for word in asked.words]
    visible = os.environ.get("GGML_VK_VISIBLE_DEVICES")
    before = f"GGML_VK_VISIBLE_DEVICES={shlex.quote(visible)} " if visible else ""
    return f"{before}python -m benchmarks.gpu_verify {shlex.join(words)}".strip()


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", text).lower()).strip("-") or "gpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_verify")
    parser.add_argument("--model", type=Path, default=model_path(), help="a GGUF file; SmolLM2-135M by default")
    parser.add_argument("--server", type=Path, help="llama-server, built from the same source")
    parser.add_argument("--minutes", type=float, default=24.0, help="for all sections together")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--software", default="", help="sizes of software devices, such as 400MiB,400MiB")
    parser.add_argument("--small", action="store_true", help="small sizes, for software devices")
    parser.add_argument("--streams", default="", help="such as 1,8,32,64")
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp on the processor")
    for internal in ("--section", "--target"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(words=sys.argv[1:])
    return parser


if __name__ == "__main__":
    sys.exit(main())
