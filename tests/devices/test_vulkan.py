"""Vulkan devices. The loader is that of this machine, where it has one; listings of real GPUs are values."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from app.devices import inventory as devices_of_host
from app.devices import llama_build, metal, pinning
from app.devices.device import GpuBackend, HardwareKind, MeasuredDevice
from app.devices.inventory import Devices
from app.devices.pci import PciGpu
from app.devices.vulkan import listing
from app.devices.vulkan.listing import PhysicalDevice, VulkanListing
from app.devices.vulkan.loader import VulkanFailed, VulkanLoader
from app.kernel.sections.fleet import FleetSettings

GIB = 2**30
ARC = PhysicalDevice(0, "Intel(R) Arc(TM) A770", "discrete", 0x8086, "a770", "0000:0a:00.0", "ANV", 16 * GIB, 15 * GIB)
RADEON = PhysicalDevice(1, "AMD Radeon RX 7900", "discrete", 0x1002, "7900", "0000:03:00.0", "RADV", 20 * GIB, None)
GRAPHICS = PhysicalDevice(2, "Intel Graphics", "integrated", 0x8086, "uhd", "0000:00:02.0", "ANV", 32 * GIB, 30 * GIB)
LLVMPIPE = PhysicalDevice(3, "llvmpipe", "software", 0x10005, "6d65", "", "llvmpipe", 2 * GIB, None)
NVIDIA = PhysicalDevice(4, "NVIDIA L4", "discrete", 0x10DE, "l4", "0000:c1:00.0", "NVIDIA", 24 * GIB, 20 * GIB)
ALL = (ARC, RADEON, GRAPHICS, LLVMPIPE)
OF_AMD = PciGpu("0000:03:00.0", 0x1002, "amdgpu", None, 20 * GIB, 2 * GIB, 0.5, 60)


def gpus(found: Sequence[PhysicalDevice], problems: list[str] | None = None) -> list[MeasuredDevice]:
    return listing.gpus(found, {OF_AMD.address: OF_AMD}, {}, [] if problems is None else problems)


def test_devices_are_named_by_address_whatever_their_numbers_are() -> None:
    again = [replace(one, number=3 - number) for number, one in enumerate(ALL)]
    first, second = gpus(ALL), gpus(list(reversed(again)))

    assert [(one.name, one.uuid, one.number) for one in first] == [
        ("vulkan-0", "vulkan-0000:00:02.0", 2),
        ("vulkan-1", "vulkan-0000:03:00.0", 1),
        ("vulkan-2", "vulkan-0000:0a:00.0", 0),
    ]
    assert [(one.name, one.uuid) for one in second] == [(one.name, one.uuid) for one in first]
    assert [one.number for one in second] == [1, 2, 3], "the numbers of the last listing"
    assert first[1].type == "AMD Radeon RX 7900 (Vulkan)", "its footprints are not those of another backend"


def test_the_kernel_measures_better_than_vulkan() -> None:
    of_intel, of_amd, arc = gpus(ALL)
    assert (of_amd.free, of_amd.utilisation, of_amd.temperature, of_amd.knows_processes) == (18 * GIB, 0.5, 60, True)
    assert (arc.free, arc.knows_processes, arc.unified) == (15 * GIB, False, False)
    assert (of_intel.unified, of_intel.software) == (True, False)


def test_a_gpu_with_two_drivers_is_listed_once() -> None:
    problems: list[str] = []
    assert len(gpus([RADEON, replace(RADEON, number=5, driver="AMDVLK")])) == 1
    assert gpus([replace(ARC, total=0)], problems) == []
    assert "left out" in problems[0]


def test_software_devices_are_used_only_as_declared() -> None:
    assert listing.software(ALL, (), 9 * GIB) == []
    assert listing.software((ARC,), (GIB,), 9 * GIB) == []
    one, two = listing.software(ALL, (GIB, 4 * GIB), 3 * GIB)
    assert [(d.name, d.total, d.free, d.number) for d in (one, two)] == [
        ("software-0", GIB, GIB, 3),
        ("software-1", 4 * GIB, 3 * GIB, 3),
    ]
    assert (one.software, one.unified, one.knows_processes) == (True, True, False)
    assert not any(device.software for device in gpus(ALL)), "never by itself"


def test_a_process_sees_exactly_its_devices() -> None:
    _, of_amd, arc = gpus(ALL)
    card = MeasuredDevice("gpu-0", HardwareKind.GPU, "NVIDIA L4", 1, 1, uuid="GPU-1")
    seen = [
        (found["CUDA_VISIBLE_DEVICES"], found["GGML_VK_VISIBLE_DEVICES"])
        for found in map(pinning.environment, ([], [card], [of_amd, arc], listing.software(ALL, (1, 1), 1)))
    ]
    assert seen == [("", ""), ("GPU-1", ""), ("", "1,0"), ("", "3,3")]


class Listed(VulkanListing):
    """The listing of another machine."""

    def __init__(self, *found: PhysicalDevice) -> None:
        super().__init__(
            [sys.executable, "-c", f"import sys\nfor _ in sys.stdin: print({self._text(found)!r}, flush=True)"]
        )

    @staticmethod
    def _text(found: Sequence[PhysicalDevice]) -> str:
        return json.dumps([asdict(one) for one in found])


class Cards:
    """NVML with one GPU, or with instances of it."""

    def __init__(self, *parts: str) -> None:
        whole = MeasuredDevice("gpu-0", HardwareKind.GPU, "NVIDIA L4", 9, 9, uuid="GPU-1", pci="0000:c1:00.0")
        self._found = [replace(whole, name=f"gpu-0-{part}", uuid=part, parent="GPU-1") for part in parts] or [whole]

    def read(self) -> tuple[list[MeasuredDevice], list[str]]:
        return list(self._found), []

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("backends", "expected"),
    [
        ({GpuBackend.VULKAN}, [("gpu-0", "vulkan", 4), ("vulkan-0", "vulkan", 1)]),
        ({GpuBackend.VULKAN, GpuBackend.CUDA}, [("gpu-0", "cuda", None), ("vulkan-0", "vulkan", 1)]),
        ({GpuBackend.CUDA}, [("gpu-0", "cuda", None)]),
        (set(), [("gpu-0", "cuda", None)]),
    ],
)
def test_a_gpu_of_nvidia_is_one_device(
    backends: set[GpuBackend], expected: list[tuple[str, str, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a llama.cpp for Vulkan alone, Vulkan computes on it, and NVML measures it."""
    monkeypatch.setattr(llama_build, "backends", lambda: backends)
    with closing(Devices(FleetSettings(), Cards(), Listed(RADEON, NVIDIA))) as devices:  # type: ignore[arg-type] # stand-ins
        found = devices.measure()
    assert [(d.name, d.backend, d.number) for d in found.devices if d.kind is HardwareKind.GPU] == expected
    assert found.devices[1].uuid == "GPU-1"
    assert [("arriero gpu check" in problem) for problem in found.problems] == [True] * (not backends)


def test_vulkan_computes_on_no_instance_of_a_partitioned_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vulkan knows the whole GPU only."""
    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.VULKAN})
    with closing(Devices(FleetSettings(), Cards("MIG-1", "MIG-2"), Listed(NVIDIA))) as devices:  # type: ignore[arg-type] # stand-ins
        found = [device for device in devices.measure().devices if device.kind is HardwareKind.GPU]
    assert [(one.name, one.backend) for one in found] == [("gpu-0-MIG-1", "cuda"), ("gpu-0-MIG-2", "cuda")]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("", "ended the listing process (exit code 0)"),
        ("input(); print('[{}]')", "not what it should be"),
        ("input(); print('nonsense')", "Expecting value"),
        ("""input(); print('{"error": "no loader"}')""", "no loader"),
        ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
    ],
)
def test_a_driver_that_fails_is_reported_and_asked_again(program: str, reason: str, tmp_path: Path) -> None:
    vulkan = VulkanListing([sys.executable, "-c", program])
    with closing(vulkan):
        for _ in range(2):
            found, problems = vulkan.read(())
            assert found == []
            assert reason in problems[0] or "Broken pipe" in problems[0]


def test_fleet_software_without_vulkan_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_build, "backends", set)
    with closing(Devices(FleetSettings(software=(GIB,)))) as devices:
        assert any("fleet.software has no effect" in problem for problem in devices.measure().problems)


def test_the_loader_of_this_machine_lists_what_it_has() -> None:
    """With Mesa there is a software device, so that structures and their order are checked against a real loader."""
    try:
        found = VulkanLoader().devices()
    except VulkanFailed as error:
        pytest.skip(str(error))
    assert [one["number"] for one in found] == list(range(len(found)))
    for one in found:
        assert one["name"]
        assert one["total"] > 0
        assert one["kind"] in {"integrated", "discrete", "virtual", "software"}
    with closing(VulkanListing()) as vulkan:
        assert [asdict(one) for one in vulkan.read(())[0]] == found


@pytest.mark.parametrize(("ram", "wired", "total"), [(16, "0", 16 * 2 / 3), (64, "0", 48), (64, "57344", 56)])
def test_the_gpu_of_an_apple_computer_has_a_part_of_its_ram(ram: int, wired: str, total: float) -> None:
    """By Apple's rule, or as an operator set it. It has not been run on one."""
    answers = {"machdep.cpu.brand_string": "Apple M3 Max", "hw.optional.arm64": "1", "hw.memsize": str(ram * GIB)}
    answers["iogpu.wired_limit_mb"] = wired
    (found,) = metal.gpus(9 * GIB, answers.__getitem__, "darwin")
    assert (found.name, found.model, found.type) == ("metal", "Apple M3 Max", "Apple M3 Max (Metal)")
    assert (found.total, found.free, found.unified) == (int(total * GIB), 9 * GIB, True)
    assert metal.gpus(GIB, answers.__getitem__, "linux") == []
    assert metal.gpus(GIB, lambda _: "", "darwin") == []
    assert devices_of_host.ram().free > 0
