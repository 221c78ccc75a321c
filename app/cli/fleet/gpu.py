"""`arriero gpu check`: why models do not run on a GPU of this host, and what to type."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
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
    root: Path = Path("/"),
) -> Iterator[GpuFinding]:
    """Yield what is known without using a GPU, from the bus to the devices of the fleet. Nodes are below `root`."""
    has = llama_build.backends()
    labels = ", ".join(one.label for one in sorted(has)) or "no GPUs"
    yield GpuFinding(True, f"llama.cpp {llama_build.build()}: {labels}")
    gpus = [device for device in measured.devices if device.kind is HardwareKind.GPU]
    answering = {gpu.pci for gpu in gpus if gpu.uuid.startswith(("GPU-", "MIG-"))}
    listed = {one.pci for one in vulkan}
    for card in cards:
        name = f"{card.vendor_name} GPU at {card.address}"
        if not card.driver:
            yield GpuFinding(False, f"{name} has no driver", "install the driver of its vendor, then restart")
            continue
        if card.vendor == _NVIDIA:
            found = _nvidia(card, name, root, answers=card.address in answering, in_container=in_container)
        else:
            found = _other(card, name, listed, root, in_container=in_container)
        yield found or GpuFinding(True, f"{name}, driver {card.driver}")
        yield from _builds(card, name, has)
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


_NVIDIA, _AMD = 0x10DE, 0x1002
#: What lets a user or a service open the nodes that Mesa's and AMD's drivers use.
_JOIN = "sudo usermod -aG render,video $USER, and log in again; for a service: SupplementaryGroups=render video"


def _nvidia(card: PciGpu, name: str, root: Path, *, answers: bool, in_container: bool) -> GpuFinding | None:
    """What is wrong with a GPU of NVIDIA that has a driver. `answers`: NVML lists it, or instances of it."""
    nodes = root / "dev/nvidiactl", root / "dev/nvidia-uvm"
    mend = "start the container with --gpus all"
    if card.driver != "nvidia":
        what = f"{name} is bound to the driver {card.driver}, which CUDA does not use"
        return GpuFinding(False, what, "install NVIDIA's driver (apt install nvidia-driver), then restart")
    numbered = [node for node in _inside(root / "dev") if re.fullmatch(r"nvidia\d+", node.name)]
    for node in (*nodes, *numbered):
        if node.exists() and not os.access(node, os.R_OK | os.W_OK):
            allow = f"sudo chmod a+rw {node}; the option NVreg_DeviceFileMode=0666 of the kernel's module keeps it so"
            return GpuFinding(False, f"{name}: this user may not use {node}", allow)
    if not answers and not (numbered and nodes[0].exists()):
        what = f"{name}: there is no node {root / 'dev'}/nvidia* for it"
        return GpuFinding(False, what, mend if in_container else "sudo nvidia-modprobe -c 0 -u")
    if not answers:
        what = f"{name}: the NVIDIA driver ({card.driver}) does not answer for it"
        return GpuFinding(False, what, mend if in_container else "run `nvidia-smi`, and mend what it says")
    if not nodes[1].exists():
        what = f"{name}: there is no {nodes[1]}, which CUDA needs"
        return GpuFinding(False, what, mend if in_container else "sudo nvidia-modprobe -c 0 -u")
    return None


def _other(card: PciGpu, name: str, listed: set[str], root: Path, *, in_container: bool) -> GpuFinding | None:
    """What is wrong with a GPU of AMD or Intel that has a driver. `listed` has the addresses of Vulkan's devices."""
    if card.node is None:
        mend = "start the container with --device /dev/dri" if in_container else "load the driver, or restart"
        return GpuFinding(False, f"{name}: its driver {card.driver} made no node in /dev/dri", mend)
    compute = [root / "dev/kfd"] if card.vendor == _AMD and (root / "dev/kfd").exists() else []
    for node in (card.node, *compute):
        if not os.access(node, os.R_OK | os.W_OK):
            options = "".join(f" --device {path}" for path in (Path("/dev/dri"), *compute))
            mend = f"start the container with{options} --group-add {_group(node)}" if in_container else _JOIN
            return GpuFinding(False, f"{name}: this user may not use {node}", mend)
    if listed and card.address not in listed:
        return GpuFinding(False, f"{name} is not listed by Vulkan", "apt install mesa-vulkan-drivers")
    return None


def _builds(card: PciGpu, name: str, has: Collection[GpuBackend]) -> Iterator[GpuFinding]:
    """Whether the installed llama.cpp computes on a GPU, and how a better build is made."""
    best = GpuBackend.CUDA if card.vendor == _NVIDIA else GpuBackend.VULKAN
    if best in has:
        return
    mend = f"{llama_build.how_to_build(best)}  # needs {llama_build.what_to_install(best)}"
    if GpuBackend.VULKAN in has:
        yield GpuFinding(True, f"{name}: this llama.cpp computes there with Vulkan; CUDA is NVIDIA's own", mend)
    else:
        yield GpuFinding(False, f"{name}: this llama.cpp cannot compute there", mend)


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
    other = bool(listed and gpu.pci and listed[0]["pci"]) and listed[0]["pci"] != gpu.pci and not gpu.parent
    if len(listed) != 1 or other:
        names = ", ".join(one["description"] for one in listed) or "no GPU"
        return GpuFinding(False, f"{gpu.name}: pinned to it, llama.cpp sees {names}", "report this as a defect")
    return GpuFinding(True, f"{gpu.name}: llama.cpp sees it as {listed[0]['name']}, {rounded(listed[0]['free'])} free")


def _in_container() -> bool:
    return any(Path(name).exists() for name in _CONTAINER_FILES)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _group(node: Path) -> int:
    try:
        return node.stat().st_gid
    except OSError:
        return 0
