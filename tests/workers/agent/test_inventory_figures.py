"""The declared devices of a host, the device environment of a pool, and the threads of pools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.devices.device import DeviceProcess, GpuBackend, HardwareKind, Inventory, MeasuredDevice
from app.kernel.sections.fleet import FleetSettings
from workers.agent import inventory

GIB = 2**30
SETTINGS = FleetSettings(ram=8 * GIB, head_room=GIB)


def gpu(number: int, *, free: int = 24 * GIB, processes: tuple[DeviceProcess, ...] = ()) -> MeasuredDevice:
    return MeasuredDevice(
        f"gpu-{number}", HardwareKind.GPU, "NVIDIA L4", 24 * GIB, free, uuid=f"GPU-{number}", processes=processes
    )


RAM = MeasuredDevice("cpu", HardwareKind.CPU, "a processor", 32 * GIB, 20 * GIB)
SIMULATED = MeasuredDevice("sim-0", HardwareKind.SIMULATED, "simulated", 24 * GIB, 24 * GIB, bandwidth=10**9)


def test_devices_are_declared_with_their_reservable_capacity() -> None:
    found = inventory.declared("h", Inventory((RAM, gpu(0), SIMULATED)), SETTINGS)

    assert [(one.id, one.type, one.capacity // GIB, one.measured.simulated) for one in found] == [
        ("h/cpu", "cpu", 8, False),
        ("GPU-0", "NVIDIA L4", 23, False),
        ("h/sim-0", "simulated", 24, True),
    ]


def test_only_the_gpus_of_a_pool_are_visible_to_it() -> None:
    three = Inventory((gpu(0), gpu(1), gpu(2), RAM))

    assert inventory.device_environment("h", three, {"GPU-2": 1, "GPU-0": 1})["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-2"
    assert inventory.device_environment("h", three, {"h/cpu": 1})["CUDA_VISIBLE_DEVICES"] == "", "none"
    assert (inventory.on_gpus("h", three, ["GPU-2"]), inventory.on_gpus("h", three, ["h/cpu"])) == (True, False)


def test_granted_bytes_that_are_not_free_are_reported_with_figures() -> None:
    taken = Inventory((gpu(0, free=4 * GIB), SIMULATED))

    assert inventory.shortage("h", taken, {"GPU-0": 4 * GIB, "h/sim-0": 24 * GIB}) == ""
    assert "only 4.00 GiB are really free" in inventory.shortage("h", taken, {"GPU-0": 5 * GIB})
    assert inventory.shortage("h", taken, {"GPU-1": 1}) == "GPU-1 is gone"


def test_bytes_are_released_when_the_driver_reports_none_of_the_process() -> None:
    held = Inventory((gpu(0, processes=(DeviceProcess(77, 1),)), gpu(1)))

    assert not inventory.are_released("h", held, {"GPU-0": 1}, {77})
    assert inventory.are_released("h", held, {"GPU-1": 1}, {77})
    assert inventory.are_released("h", held, {"GPU-0": 1}, {78})


@pytest.mark.parametrize(
    ("cores", "pools", "shares"),
    [
        (8, {"a": False}, {"a": 8}),
        (8, {"a": False, "b": False, "c": False}, {"a": 2, "b": 2, "c": 2}),
        (8, {"a": False, "g": True}, {"a": 6, "g": 2}),
        (2, {"a": False, "b": False, "c": False}, {"a": 1, "b": 1, "c": 1}),
        (1, {"g": True}, {"g": 1}),
    ],
)
def test_pools_share_the_cores_and_each_gets_at_least_one(
    cores: int, pools: dict[str, bool], shares: dict[str, int]
) -> None:
    assert inventory.thread_shares(cores, pools) == shares


def on_vulkan(name: str, size: int, **more: Any) -> MeasuredDevice:
    return MeasuredDevice(name, HardwareKind.GPU, "x", size, size, uuid=name, backend=GpuBackend.VULKAN, **more)


def test_devices_in_ram_have_a_part_of_it() -> None:
    """Bytes of an integrated GPU, of Metal and of software devices are bytes of the host: none counts twice."""
    software = on_vulkan("software-0", 2 * GIB, unified=True, software=True)
    inside = on_vulkan("vulkan-0", 60 * GIB, unified=True)

    def capacities(settings: FleetSettings, *devices: MeasuredDevice) -> list[int]:
        found = inventory.declared("h", Inventory((RAM, *devices)), settings)
        return [report.capacity for report in found]

    most = int(RAM.total * 0.8)
    assert capacities(FleetSettings(), software) == [most - 2 * GIB, 2 * GIB]
    assert capacities(FleetSettings(), inside, software) == [most - most // 2 - 2 * GIB, most // 2, 2 * GIB]
    assert capacities(FleetSettings(ram=10 * GIB, unified=4 * GIB), inside) == [6 * GIB, 4 * GIB]
    assert capacities(FleetSettings(ram=GIB), software) == [0, 2 * GIB]
    (problem,) = inventory.settings_problems(Inventory((RAM, software)), FleetSettings(ram=GIB))
    assert "leave no RAM to pools" in problem


def test_the_same_address_on_two_hosts_is_two_devices() -> None:
    card = on_vulkan("vulkan-0000:03:00.0", GIB)
    assert inventory.id_of("a", card) == "a/vulkan-0000:03:00.0"
    assert inventory.id_of("a", gpu(0)) == inventory.id_of("b", gpu(0)) == "GPU-0"


def test_software_devices_use_the_cores_of_the_host() -> None:
    both = Inventory((RAM, on_vulkan("software-0", GIB, software=True), on_vulkan("vulkan-0", GIB)))
    assert not inventory.on_gpus("h", both, ["h/software-0", "h/cpu"])
    assert inventory.on_gpus("h", both, ["h/vulkan-0", "h/cpu"])


def test_unattributed_memory_beyond_the_reservations_is_unmanaged() -> None:
    """Where no driver says which process uses the memory, pools are assumed to use what they have reserved."""
    card = replace(on_vulkan("vulkan-0", 16 * GIB, knows_processes=False), free=6 * GIB)
    (found,) = inventory.measured("h", Inventory((card,)), FleetSettings(), {1: {"h/vulkan-0": 7 * GIB}})
    assert found.unmanaged == 3 * GIB - FleetSettings().head_room
    assert inventory.used("h", Inventory((card,)), ["h/vulkan-0"], 1) == {}, "it was not measured"
