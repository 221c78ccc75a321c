"""
The inventory of a host, in the words of the ledger: what its devices hold, what is free, what pins a process to them.

A real device is declared with less than it has: some of it stays free for others. Bytes that are used by processes
without a reservation are reported as unmanaged, as far as they exceed the host's own reserve.
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
from app.devices import llama_build
from app.devices.device import HardwareKind, Inventory, MeasuredDevice
from app.fleet.hosts import DeviceReport
from app.footprint import configuration, estimate, measurements
from app.footprint.footprint import HOST
from app.footprint.layout import KnownLayout
from app.footprint.measurements import Identity
from app.kernel.database import Database
from app.kernel.errors import ModelFileDamaged
from app.kernel.fleet_settings import FleetSettings
from app.kernel.settings import Settings
from app.kernel.units.sizes import rounded
from app.scheduler import needs

#: Part of the RAM that pools may hold unless the settings say how much.
_RAM = 0.8
_MIB = 2**20
#: Cores of a pool that computes on GPUs.
_GPU_THREADS = 2
#: The number of the namespace of processes that a Linux begins with, in which its drivers see them.
_FIRST_NAMESPACE = 0xEFFFFFFC
#: What llama.cpp writes before it aborts.
_NO_MEMORY = re.compile(r"out of memory|insufficient memory|failed to allocate", re.IGNORECASE)
#: GPUs that a model is laid over.
_SPLITS = (1, 2, 4, 8)
#: Time from the start of a process until it loads, and bytes of weights that are loaded in a second, until it is known
#: better.
_BEGIN, _PACE = timedelta(seconds=5), 1e9
#: Bytes of a device that no model takes: a header that says so is garbled.
_MOST_BYTES = 1 << 50


def id_of(host: str, device: MeasuredDevice) -> str:
    """The id of a device in the fleet: a GPU's own, else its name on its host."""
    return device.uuid or f"{host}/{device.name}"


def type_of(device: MeasuredDevice) -> str:
    """What footprints are kept for."""
    if device.kind is HardwareKind.CPU:
        return needs.CPU
    return needs.SIMULATED if device.kind is HardwareKind.SIMULATED else device.model


def declared(host: str, inventory: Inventory, settings: FleetSettings) -> list[DeviceReport]:
    """The devices, with what may be reserved of each."""
    return [
        DeviceReport(id_of(host, device), type_of(device), _capacity(device, settings), device)
        for device in inventory.devices
    ]


def complaints(inventory: Inventory, settings: FleetSettings) -> list[str]:
    """Settings that this host cannot follow, in sentences for people."""
    found = []
    for device in inventory.devices:
        if device.kind is HardwareKind.CPU and settings.ram > device.total:
            found.append(f"fleet.ram is {rounded(settings.ram)}, and the host has {rounded(device.total)}: those count")
        if device.kind is HardwareKind.GPU and settings.head_room >= device.total:
            found.append(f"fleet.head_room leaves nothing of {device.name}, which has {rounded(device.total)}")
    return found


def measured(
    host: str, inventory: Inventory, settings: FleetSettings, pools: Mapping[int, Mapping[str, int]]
) -> list[DeviceReport]:
    """
    The devices as they are now. `pools` says by process what it has reserved of each device.

    Where the driver names processes otherwise than this host, pools are taken to use what they have reserved.
    """
    found, named = [], names_processes()
    for report in declared(host, inventory, settings):
        device, others = report.measured, 0
        if device.kind is HardwareKind.CPU:
            others = max(device.used - sum(_resident(pid) for pid, held in pools.items() if report.id in held), 0)
        elif device.kind is HardwareKind.GPU and named:
            others = device.used_by_others(family(pools))
        elif device.kind is HardwareKind.GPU:
            others = max(device.used - sum(held.get(report.id, 0) for held in pools.values()), 0)
        spare = device.total - report.capacity
        found.append(replace(report, unmanaged=max(others - spare, 0)))
    return found


def missing(host: str, inventory: Inventory, wanted: Mapping[str, int]) -> str:
    """Why bytes that were granted are not really there; empty when they are."""
    for device in inventory.devices:
        need = wanted.get(id_of(host, device), 0)
        if need > device.free and device.kind is not HardwareKind.SIMULATED:
            return (
                f"{rounded(need)} of {device.name} were granted, and only {rounded(device.free)} are really free: "
                "others use the rest"
            )
    known = {id_of(host, device) for device in inventory.devices}
    gone = sorted(wanted.keys() - known)
    return f"{', '.join(gone)} is gone" if gone else ""


def are_back(host: str, inventory: Inventory, wanted: Mapping[str, int], pids: Collection[int]) -> bool:
    """Whether the driver holds no bytes for these processes any more. RAM comes back with the end of a process."""
    return not any(
        process.pid in pids
        for device in inventory.devices
        if id_of(host, device) in wanted
        for process in device.processes
    )


def used(host: str, inventory: Inventory, devices: Iterable[str], pid: int) -> dict[str, int]:
    """Bytes of each of its devices that a pool uses, to the MiB. Nothing can be measured of a simulated one."""
    wanted, pids = set(devices), family([pid])
    found = {}
    for device in inventory.devices:
        id_ = id_of(host, device)
        if id_ not in wanted or device.kind is HardwareKind.SIMULATED:
            continue
        if device.kind is HardwareKind.CPU:
            found[id_] = _resident(pid)
        else:
            found[id_] = sum(process.used or 0 for process in device.processes if process.pid in pids)
    return {id_: -(-size // _MIB) * _MIB for id_, size in found.items()}


def pinned(host: str, inventory: Inventory, wanted: Mapping[str, int]) -> dict[str, str]:
    """The environment that lets a process see its devices, and no other. The order is that of the devices."""
    uuids = [device.uuid for device in inventory.devices if id_of(host, device) in wanted and device.uuid]
    return {"CUDA_VISIBLE_DEVICES": ",".join(uuids), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def on_gpus(host: str, inventory: Inventory, devices: Iterable[str]) -> bool:
    """Whether these devices, by their ids, are GPUs."""
    known = {id_of(host, device): device.kind for device in inventory.devices}
    return any(known.get(id_) is HardwareKind.GPU for id_ in devices)


def shares(cores: int, pools: Mapping[str, bool]) -> dict[str, int]:
    """
    The part of the cores of each pool; `pools` says of each whether it computes on GPUs. `cores` of 0 are all but one.

    A pool on GPUs gets two, the others share what is left; each has one at least.
    """
    available = cores or max(len(os.sched_getaffinity(0)) - 1, 1)
    left = available - _GPU_THREADS * sum(pools.values())
    others = len(pools) - sum(pools.values())
    each = max(left // max(others, 1), 1)
    return {
        id_: min(_GPU_THREADS, available) if computes_elsewhere else each for id_, computes_elsewhere in pools.items()
    }


def names_processes(root: Path = Path("/")) -> bool:
    """Whether the driver names processes as this host does; inside a container that has its own it does not."""
    try:
        return (root / "proc/self/ns/pid").stat().st_ino == _FIRST_NAMESPACE
    except OSError:
        return True


def family(pids: Iterable[int]) -> set[int]:
    """The processes and all that descend from them."""
    found = set(pids)
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return found


def stand_in(model: Model, inventory: Inventory) -> Iterator[KnownLayout]:
    """What a stand-in for the model takes on the simulated devices, if there are any: on one, or evenly on several."""
    paces = [device.bandwidth for device in inventory.devices if device.bandwidth]
    if paces and (known := needs.simulated(model, min(paces))) is not None:
        for count in [n for n in _SPLITS if n <= len(paces)]:
            yield replace(known, parts=(-(-known.parts[0] // count),) * count)


def layouts(
    model: Model, settings: Settings, inventory: Inventory, database: Database, host: str
) -> Iterator[KnownLayout]:
    """
    What the model needs on devices of each type that the host has, alone or on several of them.

    It is the best that is known without touching a device: measured, a remembered dry run, or the file's header.
    A process sees one instance of a divided GPU at a time. Without CUDA in llama.cpp, GPUs cannot be used.
    Raises ModelFileUnusable when the file is not here.
    """
    identity_on = _identities(model, settings)
    by_type: dict[str, list[MeasuredDevice]] = {}
    for device in inventory.devices:
        if device.kind is HardwareKind.CPU or (device.kind is HardwareKind.GPU and llama_build.computes_on_gpus()):
            by_type.setdefault(type_of(device), []).append(device)
    for type_, devices in by_type.items():
        most = 1 if devices[0].parent else len(devices)
        for count in [0] if type_ == needs.CPU else [n for n in _SPLITS if n <= most]:
            identity = identity_on(devices[:count])
            read = identity.header
            best = estimate.estimate(identity, database, host, allow_dry_run=False).best
            reserved = best.reserved()
            parts = [reserved[place] for place in range(count)] if count else [reserved[HOST]]
            load = _BEGIN + timedelta(seconds=read.tensor_bytes / _PACE)
            id_, ram = needs.configuration_id(model), reserved[HOST] if count else 0
            if not all(0 <= size <= _MOST_BYTES for size in (*parts, ram)):
                raise ModelFileDamaged(read.path, f"by its header it would take {max(*parts, ram):,} bytes of a device")
            yield KnownLayout(id_, type_, tuple(sorted(parts, reverse=True)), best.source.value, load, 10.0, ram)


def ran_out(code: int | None, tail: str, kills: int) -> bool:
    """Whether a process ended because memory ran out; `kills` says how often the kernel killed for that meanwhile."""
    if code == -signal.SIGKILL:
        return kills > 0
    return code == -signal.SIGABRT and _NO_MEMORY.search(tail) is not None


def count_failure(
    model: Model, settings: Settings, inventory: Inventory, database: Database, host: str, devices: Collection[str]
) -> None:
    """
    Memory ran out for a pool of the model on these devices: its next estimate is more careful.

    Raises ModelFileUnusable when the file is not here.
    """
    gpus = [one for one in inventory.devices if one.kind is HardwareKind.GPU and id_of(host, one) in devices]
    identity = _identities(model, settings)(gpus)
    with database.work() as work:
        measurements.record_failure(work, identity)


def _identities(model: Model, settings: Settings) -> Callable[[list[MeasuredDevice]], Identity]:
    """Gives the identity of a load of the model on some GPUs; its file is read once."""
    read = header.read(files.locate(model, settings.data_dir))
    adapters = [header.read(files.locate_adapter(model, lora, settings.data_dir)) for lora in model.engine.loras]
    return lambda gpus: estimate.identify(read, configuration.of_model(model, gpus=len(gpus)), gpus, adapters=adapters)


def _capacity(device: MeasuredDevice, settings: FleetSettings) -> int:
    match device.kind:
        case HardwareKind.CPU:
            return min(settings.ram or int(device.total * _RAM), device.total)
        case HardwareKind.GPU:
            return max(device.total - settings.head_room, 0)
        case HardwareKind.SIMULATED:
            return device.total


def _resident(pid: int) -> int:
    total = 0
    for one in family([pid]):
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(one).memory_info().rss
    return total
