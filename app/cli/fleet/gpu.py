"""`arriero gpu check`: why models do not run on a GPU of this host, and what to type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from app.cli.output import AsJson, console, print_json, settings_of
from app.cli.processes.programs import WORKERS
from app.devices import llama_build, pci, pinning
from app.devices.device import GpuBackend, HardwareKind, Inventory, MeasuredDevice
from app.devices.inventory import Devices
from app.devices.pci import PciGpu
from app.devices.vulkan.listing import PhysicalDevice, VulkanListing
from app.kernel.units.sizes import rounded

app = typer.Typer(no_args_is_help=True, help="GPUs of this host: what is missing before models run on them.")

#: Seconds for llama.cpp to list its devices, with a context on each.
_SECONDS = 60.0
_CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")


@dataclass(frozen=True, slots=True)
class GpuFinding:
    """One thing that was checked."""

    ok: bool
    what: str
    #: What mends it: commands, or a sentence; empty when there is nothing to do.
    mend: str = ""


@app.command()
def check(context: typer.Context, as_json: AsJson = False) -> None:
    """
    Check each GPU of this host: its driver, permissions, the build of llama.cpp, and what llama.cpp sees there.

    Each line that is not right says what to type. The exit code is 1 when there is such a line. llama.cpp makes a
    context on each GPU for a moment.
    """
    measuring, listing = Devices(settings_of(context).fleet), VulkanListing()
    try:
        measured = measuring.measure()
        vulkan, failures = listing.read(())
    finally:
        measuring.close()
        listing.close()
    found = list(findings(pci.gpus(), measured, vulkan, failures, in_container=_in_container()))
    found += [_seen(gpu) for gpu in measured.devices if gpu.kind is HardwareKind.GPU and _is_usable(gpu)]
    if as_json:
        print_json({"build": llama_build.build(), "findings": [asdict(one) for one in found]})
    else:
        for one in found:
            console().print(
                ("ok    " if one.ok else "wrong ") + one.what, soft_wrap=True, highlight=False, markup=False
            )
            if one.mend:
                console().print(f"      {one.mend}", soft_wrap=True, highlight=False, markup=False)
    raise typer.Exit(int(any(not one.ok for one in found)))


def findings(
    cards: list[PciGpu],
    measured: Inventory,
    vulkan: list[PhysicalDevice],
    failures: list[str],
    *,
    in_container: bool,
) -> Iterator[GpuFinding]:
    """Yield what is known without using a GPU, from the bus to the devices of the fleet."""
    has = llama_build.backends()
    labels = ", ".join(one.label for one in sorted(has)) or "no GPUs"
    yield GpuFinding(True, f"llama.cpp {llama_build.build()}: {labels}")
    gpus = [device for device in measured.devices if device.kind is HardwareKind.GPU]
    for card in cards:
        name = f"{card.vendor_name} GPU at {card.address}"
        if not card.driver:
            yield GpuFinding(False, f"{name} has no driver", "install the driver of its vendor, then restart")
        elif card.vendor == _NVIDIA and not any(gpu.uuid.startswith(("GPU-", "MIG-")) for gpu in gpus):
            mend = "start the container with --gpus all" if in_container else "run `nvidia-smi`, and mend what it says"
            yield GpuFinding(False, f"{name}: the NVIDIA driver ({card.driver}) does not answer", mend)
        elif card.vendor != _NVIDIA and card.node is None:
            mend = "start the container with --device /dev/dri" if in_container else "load the driver, or restart"
            yield GpuFinding(False, f"{name}: its driver {card.driver} made no node in /dev/dri", mend)
        elif card.node is not None and not os.access(card.node, os.R_OK | os.W_OK):
            mend = (
                f"start the container with --device /dev/dri --group-add {_group(card.node)}"
                if in_container
                else "sudo usermod -aG render $USER, and log in again; for a service: SupplementaryGroups=render"
            )
            yield GpuFinding(False, f"{name}: this user may not use {card.node}", mend)
        elif card.vendor != _NVIDIA and vulkan and card.address not in {one.pci for one in vulkan}:
            yield GpuFinding(False, f"{name} is not listed by Vulkan", "apt install mesa-vulkan-drivers")
        else:
            yield GpuFinding(True, f"{name}, driver {card.driver}")
        backend = GpuBackend.CUDA if card.vendor == _NVIDIA else GpuBackend.VULKAN
        if not has & {backend, GpuBackend.VULKAN}:
            yield GpuFinding(False, f"{name}: this llama.cpp cannot compute there", llama_build.how_to_build(backend))
    real = [one for one in vulkan if one.kind != "software"]
    if GpuBackend.VULKAN in has or any(card.vendor != _NVIDIA for card in cards):
        for failure in failures:
            yield GpuFinding(False, failure, "apt install libvulkan1 mesa-vulkan-drivers")
    software = [one.name for one in vulkan if one.kind == "software"]
    if software and not any(gpu.software for gpu in gpus):
        yield GpuFinding(
            True,
            f"{software[0]} is a software device: it computes on the processor, and is not used unless "
            "fleet.software allows it",
        )
    if not cards and not gpus and not real:
        hint = "--gpus all (NVIDIA) or --device /dev/dri (AMD, Intel)"
        mend = f"start the container with {hint}" if in_container else ""
        yield GpuFinding(not in_container, "no GPU was found: models run on the processor", mend)
    for gpu in gpus:
        yield GpuFinding(True, f"{gpu.name}: {gpu.model}, {rounded(gpu.free)} of {rounded(gpu.total)} free, {gpu.uuid}")
    for problem in measured.problems:
        if "gpu check" not in problem:
            yield GpuFinding(False, problem)


_NVIDIA = 0x10DE


def _is_usable(gpu: MeasuredDevice) -> bool:
    return gpu.backend in llama_build.backends()


def _seen(gpu: MeasuredDevice) -> GpuFinding:
    """What llama.cpp sees in a process that is pinned to the GPU."""
    environment = {**os.environ, **pinning.environment([gpu])}  # noqa: TID251 a child gets this environment
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", WORKERS, "gpus"],
            env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return GpuFinding(False, f"{gpu.name}: llama.cpp does not list it: {error}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return GpuFinding(False, f"{gpu.name}: llama.cpp ends with code {done.returncode} there: {last}")
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    if len(listed) != 1 or (gpu.pci and listed[0]["pci"] and listed[0]["pci"] != gpu.pci):
        names = ", ".join(one["description"] for one in listed) or "no GPU"
        return GpuFinding(False, f"{gpu.name}: pinned to it, llama.cpp sees {names}", "report this as a defect")
    return GpuFinding(True, f"{gpu.name}: llama.cpp sees it as {listed[0]['name']}, {rounded(listed[0]['free'])} free")


def _in_container() -> bool:
    return any(Path(name).exists() for name in _CONTAINER_FILES)


def _group(node: Path) -> int:
    try:
        return node.stat().st_gid
    except OSError:
        return 0
