"""What an agent tells of its host's devices, and what it makes of them. No GPU is needed: their figures are given."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from app.fleet import configuration, estimate, files, header, measurements
from app.fleet.device import Device, DeviceKind, Inventory, Process
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.fleet_settings import FleetSettings
from app.kernel.settings import Settings
from workers import inventory

GIB = 2**30
SMOLLM2 = files.read_catalog().get("smollm2:135m")
RAM = Device("cpu", DeviceKind.CPU, "processor", 64 * GIB, 40 * GIB)


def gpu(number: int, *processes: Process, parent: str = "", free: int = 20 * GIB) -> Device:
    return Device(
        f"gpu-{number}", DeviceKind.GPU, "NVIDIA L4", 24 * GIB, free,
        uuid=f"GPU-{number}", driver="570", parent=parent, processes=processes,
    )  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> Settings:
    return settings.load(environment={"ARRIERO_DATA_DIR": str(tmp_path)}).settings


def layouts(host: Settings, database: Database, *devices: Device) -> list[tuple[str, int]]:
    found = inventory.layouts(SMOLLM2, host, Inventory((RAM, *devices)), database, "here")
    return [(one.type, len(one.parts)) for one in found]


def test_a_model_may_lie_on_any_number_of_gpus(
    host: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "computes_on_gpus", lambda: True)
    assert layouts(host, database, gpu(0), gpu(1)) == [("cpu", 1), ("NVIDIA L4", 1), ("NVIDIA L4", 2)]
    divided = (gpu(0, parent="GPU-9"), gpu(1, parent="GPU-9"))
    assert layouts(host, database, *divided) == [("cpu", 1), ("NVIDIA L4", 1)], "CUDA shows a process one instance"


def test_without_cuda_there_is_nothing_for_gpus(
    host: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool would be granted the memory of a GPU and fill RAM."""
    monkeypatch.setattr(measurements, "computes_on_gpus", lambda: False)
    assert layouts(host, database, gpu(0)) == [("cpu", 1)]


def test_what_strangers_use_and_what_nobody_reserved_is_told() -> None:
    own = os.getpid()
    found = inventory.measured(
        "here", Inventory((RAM, gpu(0, Process(own, 3 * GIB), Process(1, GIB)))), FleetSettings(), [own], []
    )
    ram, card = found
    assert (card.used, card.strangers) == (4 * GIB, GIB - 512 * 2**20), "the head-room is theirs to use"
    with_it, without = (
        inventory.measured("here", Inventory((RAM,)), FleetSettings(), [own], in_ram)[0].strangers
        for in_ram in ([own], [])
    )
    assert ram.strangers == without > with_it, "the RAM of a pool on a GPU was reserved by nobody"


@pytest.mark.parametrize(
    ("code", "tail", "kills", "found"),
    [
        (-signal.SIGKILL, "", 1, True),
        (-signal.SIGKILL, "", 0, False),
        (-signal.SIGABRT, "ggml_cuda_error: CUDA error: out of memory", 0, True),
        (-signal.SIGABRT, "GGML_ASSERT(x) failed", 1, False),
        (-signal.SIGSEGV, "out of memory", 1, False),
        (1, "out of memory", 1, False),
    ],
)
def test_memory_that_ran_out_is_told_from_other_ends(code: int, tail: str, kills: int, found: bool) -> None:
    assert inventory.ran_out(code, tail, kills) is found


def test_a_pool_that_died_of_it_makes_the_next_estimate_more_careful(host: Settings, database: Database) -> None:
    gpus = Inventory((RAM, gpu(0), gpu(1)))
    inventory.count_failure(SMOLLM2, host, gpus, database, "here", ["GPU-0"])
    read = header.read(files.locate(SMOLLM2, host.data_dir))

    def floor(count: int) -> float:
        given = configuration.of_model(SMOLLM2, gpus=count)
        with database.work() as work:
            return measurements.find(work, estimate.identify(read, given, gpus.devices[1 : 1 + count])).floor

    assert (floor(1), floor(2), floor(0)) == (0.1, 0.0, 0.0)
