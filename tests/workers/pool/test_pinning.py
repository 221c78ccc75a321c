"""What a host offers, what pins a pool to its devices, and its part of the cores."""

from __future__ import annotations

import pytest

from app.devices.device import DeviceProcess, HardwareKind, Inventory, MeasuredDevice
from app.kernel.fleet_settings import FleetSettings
from workers.agent import inventory

GIB = 2**30
SETTINGS = FleetSettings(ram=8 * GIB, head_room=GIB)


def gpu(number: int, *, free: int = 24 * GIB, processes: tuple[DeviceProcess, ...] = ()) -> MeasuredDevice:
    return MeasuredDevice(
        f"gpu-{number}", HardwareKind.GPU, "NVIDIA L4", 24 * GIB, free, uuid=f"GPU-{number}", processes=processes
    )


RAM = MeasuredDevice("cpu", HardwareKind.CPU, "a processor", 32 * GIB, 20 * GIB)
SIMULATED = MeasuredDevice("sim-0", HardwareKind.SIMULATED, "simulated", 24 * GIB, 24 * GIB, bandwidth=10**9)


def test_devices_are_declared_with_what_may_be_reserved_of_them() -> None:
    found = inventory.declared("h", Inventory((RAM, gpu(0), SIMULATED)), SETTINGS)

    assert [(one.id, one.type, one.capacity // GIB, one.simulated) for one in found] == [
        ("h/cpu", "cpu", 8, False),
        ("GPU-0", "NVIDIA L4", 23, False),
        ("h/sim-0", "simulated", 24, True),
    ]


def test_a_pool_sees_its_gpus_by_uuid_and_no_other() -> None:
    three = Inventory((gpu(0), gpu(1), gpu(2), RAM))

    assert inventory.pinned("h", three, {"GPU-2": 1, "GPU-0": 1})["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-2"
    assert inventory.pinned("h", three, {"h/cpu": 1})["CUDA_VISIBLE_DEVICES"] == "", "none"
    assert (inventory.on_gpus("h", three, ["GPU-2"]), inventory.on_gpus("h", three, ["h/cpu"])) == (True, False)


def test_what_was_granted_and_is_not_really_free_is_told_with_its_figures() -> None:
    taken = Inventory((gpu(0, free=4 * GIB), SIMULATED))

    assert inventory.missing("h", taken, {"GPU-0": 4 * GIB, "h/sim-0": 24 * GIB}) == ""
    assert "only 4.00 GiB are really free" in inventory.missing("h", taken, {"GPU-0": 5 * GIB})
    assert inventory.missing("h", taken, {"GPU-1": 1}) == "GPU-1 is gone"


def test_bytes_are_back_when_the_driver_holds_none_for_the_process() -> None:
    held = Inventory((gpu(0, processes=(DeviceProcess(77, 1),)), gpu(1)))

    assert not inventory.are_back("h", held, {"GPU-0": 1}, {77})
    assert inventory.are_back("h", held, {"GPU-1": 1}, {77})
    assert inventory.are_back("h", held, {"GPU-0": 1}, {78})


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
def test_pools_share_the_cores_and_never_take_more_than_there_are_while_each_can_have_one(
    cores: int, pools: dict[str, bool], shares: dict[str, int]
) -> None:
    assert inventory.shares(cores, pools) == shares
