"""The inventory of a host: measured use, layouts and the end of processes. GPUs are simulated by their figures."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from app.catalog import files, header
from app.devices import llama_build
from app.devices.device import DeviceProcess, GpuBackend, HardwareKind, Inventory, MeasuredDevice
from app.footprint import configuration, estimate, measurements
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.sections.fleet import FleetSettings
from app.kernel.settings import Settings
from workers.agent import inventory

GIB = 2**30
SMOLLM2 = files.read_catalog().get("smollm2:135m")
RAM = MeasuredDevice("cpu", HardwareKind.CPU, "processor", 64 * GIB, 40 * GIB)


def gpu(number: int, *processes: DeviceProcess, parent: str = "", free: int = 20 * GIB) -> MeasuredDevice:
    return MeasuredDevice(
        f"gpu-{number}", HardwareKind.GPU, "NVIDIA L4", 24 * GIB, free,
        uuid=f"GPU-{number}", driver="570", parent=parent, processes=processes,
    )  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> Settings:
    return settings.load(environment={"ARRIERO_DATA_DIR": str(tmp_path)}).settings


def layouts(host: Settings, database: Database, *devices: MeasuredDevice) -> list[tuple[str, int]]:
    found = inventory.layouts(SMOLLM2, host, Inventory((RAM, *devices)), database, "here")
    return [(one.type, len(one.parts)) for one in found if bool(one.ram) == (one.type != "cpu")]


def test_a_model_may_be_split_over_several_gpus(
    host: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.CUDA})
    assert layouts(host, database, gpu(0), gpu(1)) == [("cpu", 1), ("NVIDIA L4", 1), ("NVIDIA L4", 2)]
    divided = (gpu(0, parent="GPU-9"), gpu(1, parent="GPU-9"))
    assert layouts(host, database, *divided) == [("cpu", 1), ("NVIDIA L4", 1)], (
        "CUDA shows only one instance to a process"
    )


def test_without_cuda_there_are_no_layouts_on_gpus(
    host: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a pool would reserve memory of a GPU and fill RAM."""
    monkeypatch.setattr(llama_build, "backends", set)
    assert layouts(host, database, gpu(0)) == [("cpu", 1)]


def test_a_simulated_engine_may_be_split_over_several_devices() -> None:
    entry = SMOLLM2.model_copy(update={"simulated": SMOLLM2.simulated.model_copy(update={"bytes": 9 * GIB + 1})})
    simulated = [
        MeasuredDevice(f"sim-{n}", HardwareKind.SIMULATED, "", 6 * GIB, 6 * GIB, bandwidth=10**9) for n in range(3)
    ]
    found = list(inventory.simulated_layouts(entry, Inventory((RAM, *simulated))))
    assert [one.parts for one in found] == [(9 * GIB + 1,), (9 * GIB // 2 + 1,) * 2]


def unmanaged(number: int, *devices: MeasuredDevice, reserved: dict[str, int]) -> int:
    """The unmanaged bytes of one device, while this process is a pool with these reserved bytes."""
    pools = {os.getpid(): reserved}
    return inventory.measured("here", Inventory(devices), FleetSettings(), pools)[number].unmanaged


def test_memory_of_other_processes_is_unmanaged(monkeypatch: pytest.MonkeyPatch) -> None:
    card = gpu(0, DeviceProcess(os.getpid(), 3 * GIB), DeviceProcess(1, GIB))
    head_room = FleetSettings().head_room
    monkeypatch.setattr(inventory, "sees_host_pids", lambda: True)
    assert unmanaged(0, card, reserved={"GPU-0": 2 * GIB}) == GIB - head_room, "the head-room is for other programs"
    monkeypatch.setattr(inventory, "sees_host_pids", lambda: False)
    elsewhere = gpu(0, DeviceProcess(999_999_999, 3 * GIB), DeviceProcess(999_999_998, GIB))
    assert unmanaged(0, elsewhere, reserved={"GPU-0": 2 * GIB}) == 2 * GIB - head_room
    assert unmanaged(0, elsewhere, reserved={"GPU-1": 2 * GIB}) == 4 * GIB - head_room


def test_the_ram_of_a_pool_without_reserved_ram_is_unmanaged() -> None:
    without, with_ram = ({"GPU-0": GIB}, {"GPU-0": GIB, "here/cpu": GIB})
    assert unmanaged(0, RAM, reserved=without) > unmanaged(0, RAM, reserved=with_ram)


def test_a_container_has_its_own_pid_namespace(tmp_path: Path) -> None:
    namespace = tmp_path / "proc/self/ns/pid"
    namespace.parent.mkdir(parents=True)
    namespace.touch()
    assert not inventory.sees_host_pids(tmp_path)
    assert inventory.sees_host_pids(tmp_path / "no Linux")


@pytest.mark.parametrize(
    ("code", "tail", "oom_kills", "expected"),
    [
        (-signal.SIGKILL, "", 1, True),
        (-signal.SIGKILL, "", 0, False),
        (-signal.SIGABRT, "ggml_cuda_error: CUDA error: out of memory", 0, True),
        (-signal.SIGABRT, "what():  vk::Device::allocateMemory: ErrorOutOfDeviceMemory", 0, True),
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", 0, True),
        (-signal.SIGABRT, "GGML_ASSERT(x) failed", 1, False),
        (-signal.SIGSEGV, "out of memory", 1, False),
        (1, "out of memory", 1, False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_ends(code: int, tail: str, oom_kills: int, expected: bool) -> None:
    assert inventory.is_out_of_memory(code, tail, oom_kills) is expected


def test_out_of_memory_raises_the_margin_of_the_next_estimate(host: Settings, database: Database) -> None:
    gpus = Inventory((RAM, gpu(0), gpu(1)))
    inventory.count_failure(SMOLLM2, host, gpus, database, "here", ["GPU-0"])
    read = header.read(files.locate(SMOLLM2, host.data_dir))

    def floor(count: int) -> float:
        given = configuration.of_model(SMOLLM2, gpus=count)
        with database.work() as work:
            return measurements.find(work, estimate.identify(read, given, gpus.devices[1 : 1 + count])).margin_floor

    assert (floor(1), floor(2), floor(0)) == (0.1, 0.0, 0.0)
