"""
Devices: their measurement, and the problems that are reported when it fails.

These tests use no GPU. They check the adapter against the symbols and structures of the package nvidia-ml-py; their
values follow NVML's reference.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pynvml
import pytest

from app.devices import control_group, llama_build, nvml
from app.devices.device import DeviceProcess, GpuBackend, HardwareKind, Inventory, MeasuredDevice
from app.devices.inventory import Devices, ram
from app.devices.nvml import Gpus
from app.fleet.hosts import Hosts
from app.kernel.database import Database
from app.kernel.sections.fleet import FleetSettings, SimulatedDevice
from tests.fleet.granting import LEASE
from workers.agent import inventory

GIB = 2**30


def snake(name: str) -> str:
    """Converts a name: `nvmlDeviceGetUUID` to `device_get_uuid`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removeprefix("nvml")).lower()


class Driver:
    """A fake NVML with two GPUs, the second one with MIG instances, that returns pynvml's own structures."""

    def __init__(self) -> None:
        self.refuses: dict[str, type[pynvml.NVMLError]] = {}
        self.opened = 0

    def __getattr__(self, name: str) -> Any:
        constant = getattr(pynvml, name)  # a symbol that the package lacks fails the test
        if not callable(constant) or inspect.isclass(constant):
            return constant
        if name in self.refuses:
            return self._refuse(self.refuses[name])
        return getattr(self, snake(name))

    @staticmethod
    def _refuse(error: type[pynvml.NVMLError]) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise error(getattr(error, "value", None) or pynvml.NVML_ERROR_UNKNOWN)

        return refuse

    def init(self) -> None:
        self.opened += 1

    def shutdown(self) -> None:
        pass

    def system_get_driver_version(self) -> str:
        return "570.124.06"

    def device_get_count(self) -> int:
        return 2

    def device_get_handle_by_index(self, index: int) -> tuple[int, ...]:
        return (index,)

    def device_get_uuid(self, handle: tuple[int, ...]) -> str:
        return ("GPU-" if len(handle) == 1 else "MIG-") + "-".join(map(str, handle))

    def device_get_name(self, handle: tuple[int, ...]) -> str:
        return "NVIDIA A100-SXM4-40GB" + (" MIG 3g.20gb" if len(handle) > 1 else "")

    def device_get_memory_info(self, _handle: tuple[int, ...], version: int | None = None) -> Any:
        memory = pynvml.c_nvmlMemory_v2_t() if version else pynvml.c_nvmlMemory_t()
        memory.total, memory.used, memory.free = 40 * GIB, 8 * GIB, 31 * GIB
        if version:
            memory.reserved = 1 * GIB
        return memory

    def device_get_mig_mode(self, handle: tuple[int, ...]) -> list[int]:
        return [int(handle[0] == 1), 0]

    def device_get_max_mig_device_count(self, _handle: tuple[int, ...]) -> int:
        return 7

    def device_get_mig_device_handle_by_index(self, handle: tuple[int, ...], number: int) -> tuple[int, ...]:
        if number not in (0, 2):
            raise pynvml.NVMLError_NotFound(pynvml.NVML_ERROR_NOT_FOUND)
        return (*handle, number)

    def device_get_pci_info(self, handle: tuple[int, ...]) -> Any:
        info = pynvml.nvmlPciInfo_t()
        info.busId = f"00000000:C{handle[0]}:00.0".encode()
        return info

    def device_get_temperature(self, _handle: tuple[int, ...], _sensor: int) -> int:
        return 41

    def device_get_utilization_rates(self, _handle: tuple[int, ...]) -> Any:
        rates = pynvml.c_nvmlUtilization_t()
        rates.gpu, rates.memory = 87, 40
        return rates

    def device_get_compute_running_processes_v3(self, _handle: tuple[int, ...]) -> list[Any]:
        return [SimpleNamespace(pid=70, usedGpuMemory=5 * GIB), SimpleNamespace(pid=71, usedGpuMemory=None)]

    def device_get_compute_running_processes_v2(self, _handle: tuple[int, ...]) -> list[Any]:
        return [SimpleNamespace(pid=72, usedGpuMemory=GIB)]

    def device_get_graphics_running_processes_v2(self, _handle: tuple[int, ...]) -> list[Any]:
        raise AssertionError("the newer call is supported")

    def device_get_graphics_running_processes_v3(self, _handle: tuple[int, ...]) -> list[Any]:
        return [SimpleNamespace(pid=70, usedGpuMemory=5 * GIB)]


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_the_package_has_the_symbols_that_the_adapter_uses() -> None:
    """Contract: every symbol of nvidia-ml-py that the adapter uses exists, and has the expected parameters."""
    source = inspect.getsource(nvml)
    names = set(re.findall(r"(?:nvml|_nvml|pynvml)\.(nvml\w+|NVML\w+)", source))
    assert len(names) > 20
    assert [name for name in names if not hasattr(pynvml, name)] == []
    for name in names:
        real, fake = getattr(pynvml, name), getattr(Driver, snake(name), None)
        if inspect.isfunction(real) and fake is not None:
            assert len(inspect.signature(real).parameters) == len(inspect.signature(fake).parameters) - 1, name
    for kind, fields in ((pynvml.c_nvmlMemory_v2_t, "total reserved free used"), (pynvml.c_nvmlUtilization_t, "gpu")):
        assert set(fields.split()) <= {name for name, _ in kind._fields_}


def test_gpus_and_mig_instances_are_measured(driver: Driver) -> None:
    devices, problems = Gpus(driver).read()
    assert problems == []
    whole, first, second = devices
    assert (whole.name, whole.uuid, whole.driver, whole.parent) == ("gpu-0", "GPU-0", "570.124.06", "")
    assert (whole.total, whole.free, whole.used) == (39 * GIB, 31 * GIB, 8 * GIB)
    assert (whole.temperature, whole.utilisation) == (41, 0.87)
    assert whole.processes == (DeviceProcess(70, 5 * GIB), DeviceProcess(71, None))
    assert [(d.name, d.uuid, d.parent) for d in (first, second)] == [
        ("gpu-1-0", "MIG-1-0", "GPU-1"),
        ("gpu-1-2", "MIG-1-2", "GPU-1"),
    ]


@pytest.mark.parametrize(
    ("answer", "given", "problem"),
    [
        ("device_get_name", b"NVIDIA\0\xff" + b"x" * 500, ""),
        ("device_get_name", "A100\0\ud83e\x1b[2J" + "x" * 500, ""),
        ("device_get_uuid", b"\xff" * 500, ""),
        ("device_get_temperature", 2**32 - 1, ""),
        ("device_get_memory_info", SimpleNamespace(total=2**64 - 1, free=1, reserved=0), "18,446,744,073,709,551,615"),
        ("device_get_memory_info", SimpleNamespace(total=GIB, free=1, reserved=2**63), "bytes of memory"),
        ("device_get_memory_info", SimpleNamespace(total=0, free=0, reserved=0), "reports 0 bytes"),
        ("device_get_memory_info", SimpleNamespace(), "no attribute"),
    ],
)
def test_a_gpu_with_invalid_values_does_not_hide_the_others(
    driver: Driver, answer: str, given: Any, problem: str, database: Database
) -> None:
    right = getattr(driver, answer)

    def wrong(handle: Any, *more: Any, **named: Any) -> Any:
        return given if handle == (0,) else right(handle, *more, **named)

    setattr(driver, answer, wrong)
    devices, problems = Gpus(driver).read()
    assert {"gpu-1-0", "gpu-1-2"} <= {device.name for device in devices}
    assert ("gpu-0" in {device.name for device in devices}) is not bool(problem)
    assert all(problem in text for text in problems)
    assert len(problems) == bool(problem)

    # The measurement can be stored.
    hosts, settings, seen = Hosts(database, LEASE, LEASE), FleetSettings(), Inventory(tuple(devices), tuple(problems))
    agent = hosts.join("h", "h", 1, inventory.declared("h", seen, settings), {})
    hosts.heartbeat("h", agent, inventory.measured("h", seen, settings, {}), [], problems)


class Library:
    """A fake of an older libnvidia-ml.so: pynvml itself reads its results."""

    TEXTS: ClassVar = {
        "nvmlSystemGetDriverVersion": "570.124.06",
        "nvmlDeviceGetUUID": "MIG-1",
        "nvmlDeviceGetName": "NVIDIA MIG 3g.20gb",
    }
    NUMBERS: ClassVar = {
        "nvmlDeviceGetCount_v2": 1,
        "nvmlDeviceGetTemperature": 41,
        "nvmlDeviceGetMigMode": 1,
        "nvmlDeviceGetMaxMigDeviceCount": 2,
    }
    #: Process ids and bytes; the driver reports unknown bytes as all ones.
    PROCESSES = ((70, 5 * GIB), (71, 2**64 - 1))

    def __getattr__(self, name: str) -> Any:
        if name in self.TEXTS:
            return lambda *given: self._write(given[-2], self.TEXTS[name])
        if name in self.NUMBERS:
            return lambda *given: self._set(given, self.NUMBERS[name])
        if name in {"nvmlInitWithFlags", "nvmlShutdown", "nvmlDeviceGetHandleByIndex_v2"}:
            return lambda *_: pynvml.NVML_SUCCESS
        if name == "nvmlDeviceGetMigDeviceHandleByIndex":
            return lambda _, index, __: pynvml.NVML_ERROR_NOT_FOUND if index.value else pynvml.NVML_SUCCESS
        if name == "nvmlDeviceGetMemoryInfo_v2":
            return self._memory
        if name == "nvmlDeviceGetComputeRunningProcesses_v2":
            return self._processes
        raise AttributeError(name)  # like a library that is older than the symbol

    @staticmethod
    def _write(buffer: Any, text: str) -> int:
        buffer.value = text.encode()
        return int(pynvml.NVML_SUCCESS)

    @staticmethod
    def _set(given: tuple[Any, ...], value: int) -> int:
        for pointer in given:
            if hasattr(pointer, "_obj"):
                pointer._obj.value = value
        return int(pynvml.NVML_SUCCESS)

    @staticmethod
    def _memory(_: Any, pointer: Any) -> int:
        memory = pointer._obj
        assert memory.version == pynvml.nvmlMemory_v2, "the driver rejects other versions"
        memory.total, memory.reserved, memory.free, memory.used = 40 * GIB, GIB, 31 * GIB, 8 * GIB
        return int(pynvml.NVML_SUCCESS)

    def _processes(self, _: Any, count: Any, array: Any) -> int:
        count._obj.value = len(self.PROCESSES)
        if array is None:
            return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
        for place, (pid, used) in enumerate(self.PROCESSES):
            array[place].pid, array[place].usedGpuMemory = pid, used
        return int(pynvml.NVML_SUCCESS)


def test_the_package_reads_the_structures_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pynvml with a fake library: buffers, structures, versions and sizes; an older library lacks calls."""
    monkeypatch.setattr(pynvml, "nvmlLib", Library())
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    gpus = Gpus()
    devices, problems = gpus.read()
    gpus.close()
    assert problems == []
    assert devices == [
        MeasuredDevice(
            "gpu-0-0", HardwareKind.GPU, "NVIDIA MIG 3g.20gb", 39 * GIB, 31 * GIB, uuid="MIG-1", driver="570.124.06",
            parent="MIG-1", processes=(DeviceProcess(70, 5 * GIB), DeviceProcess(71, None)), temperature=41,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("cuda", [True, False])
def test_gpus_that_llama_cpp_cannot_use_are_a_problem(
    driver: Driver, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.CUDA} if cuda else set())
    inventory = Devices(FleetSettings(), Gpus(driver)).measure()
    assert len(inventory.devices) == 4
    assert [("without CUDA" in problem) for problem in inventory.problems] == [True] * (not cuda)
    assert all(llama_build.how_to_build(GpuBackend.CUDA) in problem for problem in inventory.problems)


def test_unmanaged_memory_is_used_memory(driver: Driver) -> None:
    device = Gpus(driver).read()[0][0]
    assert device.used_by_others([70]) == 3 * GIB
    assert device.used_by_others([71]) == 8 * GIB, "memory that the driver does not attribute counts as used by others"


def test_a_host_without_nvml_is_normal() -> None:
    """The real library, on a machine without a driver; with a driver, this test measures its GPUs."""
    gpus = Gpus()
    devices, problems = gpus.read()
    gpus.close()
    assert problems == []
    assert all(device.total > 0 for device in devices)


def test_a_broken_driver_is_reported_and_tried_again(driver: Driver) -> None:
    gpus = Gpus(driver)
    driver.refuses["nvmlInit"] = pynvml.NVMLError_LibRmVersionMismatch
    devices, problems = gpus.read()
    assert devices == []
    assert "does not respond" in problems[0]
    driver.refuses.clear()
    assert len(gpus.read()[0]) == 3


def test_a_failing_gpu_is_reported_and_the_others_are_measured(driver: Driver) -> None:
    driver.refuses["nvmlDeviceGetMaxMigDeviceCount"] = pynvml.NVMLError_GpuIsLost
    gpus = Gpus(driver)
    devices, problems = gpus.read()
    assert [device.name for device in devices] == ["gpu-0"]
    assert problems[0].startswith("gpu-1 is left out: ")
    gpus.read()
    assert driver.opened == 2, "the driver is connected again after a GPU was lost"


def test_unsupported_queries_return_unknown_values(driver: Driver) -> None:
    processes = ("GetComputeRunningProcesses_v3", "GetComputeRunningProcesses_v2")
    for name in ("GetTemperature", "GetUtilizationRates", "GetMigMode", *processes):
        driver.refuses[f"nvmlDevice{name}"] = pynvml.NVMLError_NotSupported
    device = Gpus(driver).read()[0][0]
    assert (device.temperature, device.utilisation) == (None, None)
    assert device.processes == (DeviceProcess(70, 5 * GIB),)


def test_processes_of_an_older_driver_are_read_with_an_older_call(driver: Driver) -> None:
    driver.refuses["nvmlDeviceGetComputeRunningProcesses_v3"] = pynvml.NVMLError_FunctionNotFound
    assert Gpus(driver).read()[0][0].processes == (DeviceProcess(70, 5 * GIB), DeviceProcess(72, GIB))


def test_an_old_driver_counts_reserved_memory_as_used(driver: Driver) -> None:
    old = driver.device_get_memory_info

    def info(handle: tuple[int, ...], version: int | None = None) -> Any:
        if version:
            raise pynvml.NVMLError_FunctionNotFound(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return old(handle)

    driver.device_get_memory_info = info  # type: ignore[method-assign]  # an old driver
    device = Gpus(driver).read()[0][0]
    assert (device.total, device.used) == (40 * GIB, 9 * GIB)


def test_simulated_devices_are_marked() -> None:
    settings = FleetSettings(simulated=(SimulatedDevice(name="sim-0", bytes=24 * GIB, speed=2.0),))
    inventory = Devices(settings).measure()
    device = inventory.find("sim-0")
    assert device is not None
    assert (device.kind, device.model, device.free, device.speed) == (
        HardwareKind.SIMULATED,
        "simulated",
        24 * GIB,
        2.0,
    )
    assert inventory.devices[0].name == "cpu"


def test_ram_is_at_most_that_of_the_machine() -> None:
    device = ram()
    assert 0 < device.free <= device.total <= psutil.virtual_memory().total


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


#: Files of a machine with systemd: a service with a limit inside a slice with another limit.
V2 = {
    "proc/self/cgroup": "0::/system.slice/arriero.service/pool\n",
    "proc/self/mountinfo": "24 23 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
    "sys/fs/cgroup/system.slice/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/system.slice/memory.high": "max\n",
    "sys/fs/cgroup/system.slice/memory.current": f"{7 * GIB}\n",
    "sys/fs/cgroup/system.slice/memory.stat": f"anon 5\nfile {2 * GIB}\ninactive_file {GIB}\n",
    "sys/fs/cgroup/system.slice/arriero.service/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/arriero.service/memory.high": f"{4 * GIB}\n",
    "sys/fs/cgroup/system.slice/arriero.service/memory.current": f"{GIB}\n",
    "sys/fs/cgroup/system.slice/arriero.service/memory.stat": "inactive_file 0\n",
    "sys/fs/cgroup/system.slice/arriero.service/pool/memory.max": "max\n",
}
#: As a container of version 1 sees it: the group's path is the host's, the mount is the group itself.
V1 = {
    "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
    "proc/self/mountinfo": "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
}


def test_the_limit_of_every_control_group_level_applies(tmp_path: Path) -> None:
    limit = control_group.find(tree(tmp_path, V2))
    assert limit is not None
    assert limit.total == 4 * GIB
    assert limit.path == tmp_path / "sys/fs/cgroup/system.slice/arriero.service/memory.high"
    assert limit.free == 2 * GIB, "the parent slice has less free: 8 - (7 - 1) GiB"


def test_control_groups_version_1(tmp_path: Path) -> None:
    limit = control_group.find(tree(tmp_path, V1))
    assert limit is not None
    assert (limit.total, limit.free) == (2 * GIB, GIB + GIB // 2)
    device = ram(tmp_path)
    assert device.total == min(2 * GIB, psutil.virtual_memory().total)


@pytest.mark.parametrize(
    "files",
    [
        {},
        V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
        V2 | {name: "max\n" for name in V2 if name.endswith(("memory.max", "memory.high"))},
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2["proc/self/mountinfo"]},
    ],
)
def test_there_is_no_limit(tmp_path: Path, files: dict[str, str]) -> None:
    assert control_group.find(tree(tmp_path, files)) is None


def test_oom_kills_are_counted(tmp_path: Path) -> None:
    assert control_group.oom_kills(tree(tmp_path, {"proc/vmstat": "nr_free_pages 9\noom_kill 3\nswap_ra 1\n"})) == 3
    assert control_group.oom_kills(tmp_path / "elsewhere") == 0
    assert control_group.oom_kills() >= 0
