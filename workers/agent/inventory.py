"""
The inventory of a host in the terms of the ledger: capacity and use of its devices, and the environment of pools.

A real device is declared with less than its total: the rest stays free for other programs. Memory that processes
without a reservation use counts as unmanaged, as far as it reduces what can be reserved.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil

from app.catalog import files, header
from app.catalog.model import Model
from app.devices import llama_build, pinning
from app.devices.device import HardwareKind, Inventory, MeasuredDevice
from app.fleet.hosts import DeviceReport
from app.footprint import configuration, estimate, measurements
from app.footprint.footprint import HOST
from app.footprint.layout import KnownLayout
from app.footprint.measurements import Identity
from app.kernel.database import Database
from app.kernel.errors import ModelFileDamaged
from app.kernel.sections.fleet import FleetSettings
from app.kernel.settings import Settings
from app.kernel.units.sizes import rounded
from app.scheduler import needs
from app.scheduler.planner.cluster import CPU, SIMULATED

#: Part of the RAM that pools may reserve when `fleet.ram` is not set.
_RAM_SHARE = 0.8
_MIB = 2**20
#: Threads of a pool that computes on GPUs.
_GPU_THREADS = 2
#: How UUIDs begin that no other host has: NVML's. A PCI address, or Vulkan's UUID, is that of its host only.
_WORLDWIDE = ("GPU-", "MIG-")
#: The inode of the initial PID namespace of Linux, whose process ids its drivers report.
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
#: What llama.cpp logs before it aborts for want of memory.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|insufficient memory|failed to allocate|OutOf(?:Device|Host)Memory|std::bad_alloc", re.IGNORECASE
)
#: Numbers of GPUs over which a model may be split.
_SPLITS = (1, 2, 4, 8)
#: Estimates until a load was measured: time from the start of a process until it loads, and bytes of weights that are
#: loaded in a second.
_START, _LOAD_RATE = timedelta(seconds=5), 1e9
#: Most bytes of a device that a model can need: a header with a larger result is damaged.
_MAX_DEVICE_BYTES = 1 << 50


def id_of(host: str, device: MeasuredDevice) -> str:
    """Return the id of a device in the fleet: the UUID of an NVIDIA GPU, otherwise host and identity or name."""
    if device.uuid.startswith(_WORLDWIDE):
        return device.uuid
    return f"{host}/{device.uuid or device.name}"


def type_of(device: MeasuredDevice) -> str:
    """Return the type of a device; footprints are stored per type."""
    if device.kind is HardwareKind.CPU:
        return CPU
    return SIMULATED if device.kind is HardwareKind.SIMULATED else device.type


def declared(host: str, inventory: Inventory, settings: FleetSettings) -> list[DeviceReport]:
    """Return the devices, with the bytes that can be reserved on each."""
    capacities = _capacities(inventory, settings)
    return [
        DeviceReport(id_of(host, device), type_of(device), capacities[device.name], device)
        for device in inventory.devices
    ]


def settings_problems(inventory: Inventory, settings: FleetSettings) -> list[str]:
    """Return sentences for people about settings that do not fit this host."""
    found = []
    for device in inventory.devices:
        if device.kind is HardwareKind.CPU and settings.ram > device.total:
            found.append(
                f"fleet.ram is {rounded(settings.ram)}, but the host has {rounded(device.total)}, which are used"
            )
        if device.kind is HardwareKind.GPU and not device.unified and settings.head_room >= device.total:
            found.append(f"fleet.head_room leaves no memory of {device.name}, which has {rounded(device.total)}")
    if any(device.unified for device in inventory.devices) and _capacities(inventory, settings).get("cpu") == 0:
        found.append("fleet.unified and fleet.software leave no RAM to pools: every pool needs some")
    return found


def measured(
    host: str, inventory: Inventory, settings: FleetSettings, pools: Mapping[int, Mapping[str, int]]
) -> list[DeviceReport]:
    """
    Return the devices with their unmanaged bytes. `pools` has the reserved bytes by device, for each process id of a
    pool.

    Where the driver reports process ids of another namespace, pools are assumed to use what they have reserved.
    """
    found, pids_are_known = [], sees_host_pids()
    for report in declared(host, inventory, settings):
        device, others = report.measured, 0
        if device.kind is HardwareKind.CPU:
            others = max(device.used - sum(_resident(pid) for pid, held in pools.items() if report.id in held), 0)
        elif (
            device.kind is HardwareKind.GPU
            and device.knows_processes
            and (pids_are_known or not device.uuid.startswith(_WORLDWIDE))
        ):
            others = device.used_by_others(process_tree(pools))
        elif device.kind is HardwareKind.GPU:
            others = max(device.used - sum(held.get(report.id, 0) for held in pools.values()), 0)
        spare = device.total - report.capacity
        found.append(replace(report, unmanaged=max(others - spare, 0)))
    return found


def shortage(host: str, inventory: Inventory, granted: Mapping[str, int]) -> str:
    """Return why granted bytes are not really free; empty when they are."""
    for device in inventory.devices:
        need = granted.get(id_of(host, device), 0)
        if need > device.free and device.kind is not HardwareKind.SIMULATED:
            return (
                f"{rounded(need)} of {device.name} were granted, but only {rounded(device.free)} are really free: "
                "other programs use the rest"
            )
    known = {id_of(host, device) for device in inventory.devices}
    gone = sorted(granted.keys() - known)
    return f"{', '.join(gone)} is gone" if gone else ""


def are_released(host: str, inventory: Inventory, devices: Collection[str], pids: Collection[int]) -> bool:
    """Whether the driver reports no memory of these processes any more. RAM is free when a process has ended."""
    return not any(
        process.pid in pids
        for device in inventory.devices
        if id_of(host, device) in devices
        for process in device.processes
    )


def used(host: str, inventory: Inventory, devices: Iterable[str], pid: int) -> dict[str, int]:
    """Return the bytes that a pool uses on each of its devices, rounded up to MiB; simulated devices are left out."""
    ids, pids = set(devices), process_tree([pid])
    found = {}
    for device in inventory.devices:
        id_ = id_of(host, device)
        if id_ not in ids or device.kind is HardwareKind.SIMULATED or not device.knows_processes:
            continue
        if device.kind is HardwareKind.CPU:
            found[id_] = _resident(pid)
        else:
            found[id_] = sum(process.used or 0 for process in device.processes if process.pid in pids)
    return {id_: -(-size // _MIB) * _MIB for id_, size in found.items()}


#: How the threads of llama.cpp (libgomp's) wait for one another within a step: they spin for a tenth of a millisecond,
#: and then sleep. By default they spin for some milliseconds: with other processes on the same cores, a thread that
#: waits for one without a core keeps the core that this one needs.
THREAD_ENVIRONMENT: Mapping[str, str] = {"GOMP_SPINCOUNT": "2000"}


def device_environment(host: str, inventory: Inventory, devices: Collection[str]) -> dict[str, str]:
    """Return the variables that make only these devices visible to a process, in the order of the inventory."""
    return pinning.environment(device for device in inventory.devices if id_of(host, device) in devices)


def on_gpus(host: str, inventory: Inventory, devices: Iterable[str]) -> bool:
    """Whether one of these devices is a GPU. A software device is none: it computes on the cores of the host."""
    known = {
        id_of(host, device) for device in inventory.devices if device.kind is HardwareKind.GPU and not device.software
    }
    return not known.isdisjoint(devices)


def thread_shares(cores: int, pools: Mapping[str, bool]) -> dict[str, int]:
    """
    Return the threads of each pool. `pools` has for each whether it computes on GPUs; 0 `cores` means all but one.

    A pool on GPUs gets two, the others share the rest; each gets at least one.
    """
    available = cores or max(len(os.sched_getaffinity(0)) - 1, 1)
    left = available - _GPU_THREADS * sum(pools.values())
    others = len(pools) - sum(pools.values())
    each = max(left // max(others, 1), 1)
    return {id_: min(_GPU_THREADS, available) if computes_on_gpus else each for id_, computes_on_gpus in pools.items()}


def sees_host_pids(root: Path = Path("/")) -> bool:
    """Whether the driver's process ids are valid here; in a container with its own PID namespace they are not."""
    try:
        return (root / "proc/self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE
    except OSError:
        return True


def process_tree(pids: Iterable[int]) -> set[int]:
    """Return the ids of these processes and all their descendants."""
    found = set(pids)
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return found


def simulated_layouts(model: Model, inventory: Inventory) -> Iterator[KnownLayout]:
    """Yield the layouts of a simulated engine of the model: on one simulated device, or split evenly over several."""
    bandwidths = [device.bandwidth for device in inventory.devices if device.bandwidth]
    if bandwidths and (known := needs.simulated(model, min(bandwidths))) is not None:
        for count in [n for n in _SPLITS if n <= len(bandwidths)]:
            yield replace(known, parts=(-(-known.parts[0] // count),) * count)


def layouts(
    model: Model, settings: Settings, inventory: Inventory, database: Database, host: str
) -> Iterator[KnownLayout]:
    """
    Yield what the model needs on each type of device of the host, on one or several devices.

    It is the best figure that is available without using a device: a measurement, a stored dry run, or the closed form.
    A process sees only one instance of a partitioned GPU. A GPU whose backend llama.cpp lacks cannot be used.
    Raises ModelFileUnusable when the file is not on this host.
    """
    identity_on = _identities(model, settings)
    by_type: dict[str, list[MeasuredDevice]] = {}
    for device in inventory.devices:
        if device.kind is HardwareKind.CPU or (
            device.kind is HardwareKind.GPU and device.backend in llama_build.backends()
        ):
            by_type.setdefault(type_of(device), []).append(device)
    for type_, devices in by_type.items():
        most = 1 if devices[0].parent else len(devices)
        for count in [0] if type_ == CPU else [n for n in _SPLITS if n <= most]:
            identity = identity_on(devices[:count])
            read = identity.header
            best = estimate.estimate(identity, database, host, allow_dry_run=False).best
            reserved = best.reserved()
            parts = [reserved[place] for place in range(count)] if count else [reserved[HOST]]
            load = _START + timedelta(seconds=read.tensor_bytes / _LOAD_RATE)
            id_, ram = needs.configuration_id(model), reserved[HOST] if count else 0
            if not all(0 <= size <= _MAX_DEVICE_BYTES for size in (*parts, ram)):
                raise ModelFileDamaged(read.path, f"by its header it would need {max(*parts, ram):,} bytes of a device")
            yield KnownLayout(id_, type_, tuple(sorted(parts, reverse=True)), best.source.value, load, 10.0, ram)


def remote_layouts(model: Model, inventory: Inventory) -> Iterator[KnownLayout]:
    """Yield the layout of a model that a server serves: a process in the RAM of the host, and no device."""
    if any(device.kind is HardwareKind.CPU for device in inventory.devices):
        yield needs.of_server(model)


def is_out_of_memory(code: int | None, tail: str, oom_kills: int) -> bool:
    """Whether a process ended because memory ran out. `oom_kills` counts the kernel's kills during its life."""
    if code == -signal.SIGKILL:
        return oom_kills > 0
    return code == -signal.SIGABRT and _OUT_OF_MEMORY.search(tail) is not None


def count_failure(
    model: Model, settings: Settings, inventory: Inventory, database: Database, host: str, devices: Collection[str]
) -> None:
    """
    Record that a pool of the model ran out of memory on these devices: the margin of its next estimate is larger.

    Raises ModelFileUnusable when the file is not on this host.
    """
    gpus = [one for one in inventory.devices if one.kind is HardwareKind.GPU and id_of(host, one) in devices]
    identity = _identities(model, settings)(gpus)
    with database.work() as work:
        measurements.record_failure(work, identity)


def _identities(model: Model, settings: Settings) -> Callable[[list[MeasuredDevice]], Identity]:
    """Return a function from GPUs to the identity of a load of the model there. The file is read once."""
    read = header.read(files.locate(model, settings.data_dir))
    adapters = [header.read(files.locate_adapter(model, lora, settings.data_dir)) for lora in model.engine.loras]
    found = files.locate_projector(model, settings.data_dir)
    projector = None if found is None else header.read(found)
    found = files.locate_draft(model, settings.data_dir)
    draft = None if found is None else header.read(found)
    return lambda gpus: estimate.identify(
        read, configuration.of_model(model, gpus=len(gpus)), gpus, adapters=adapters, projector=projector, draft=draft
    )


def _capacities(inventory: Inventory, settings: FleetSettings) -> dict[str, int]:
    """Return the bytes of each device that can be reserved. Devices in RAM have a part of it, and it has the rest."""
    ram = next((device for device in inventory.devices if device.kind is HardwareKind.CPU), None)
    left = min(settings.ram or int(ram.total * _RAM_SHARE), ram.total) if ram else 0
    share = min(settings.unified or left // 2, left)
    found = {}
    for device in inventory.devices:
        match device:
            case MeasuredDevice(software=True) | MeasuredDevice(kind=HardwareKind.SIMULATED):
                found[device.name] = device.total
            case MeasuredDevice(unified=True):
                found[device.name] = min(share, device.total)
                share -= found[device.name]
            case MeasuredDevice(kind=HardwareKind.GPU):
                found[device.name] = max(device.total - settings.head_room, 0)
    if ram is not None:
        found[ram.name] = max(left - sum(found[device.name] for device in inventory.devices if device.unified), 0)
    return found


def _resident(pid: int) -> int:
    total = 0
    for one in process_tree([pid]):
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(one).memory_info().rss
    return total
