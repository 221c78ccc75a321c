"""
NVIDIA GPUs, measured with NVML: the driver's own figures, without a CUDA context.

A host without NVML has no such GPUs; this is normal and logged once.
When NVML is installed but fails, each reading reports the problem, and the next one tries again.
With MIG, the instances of a GPU are devices, and the GPU itself is not.
A GPU with unknown or impossible memory figures is left out with a reported problem; the others are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pynvml

from app.devices.device import DeviceProcess, HardwareKind, MeasuredDevice
from app.kernel import log
from app.kernel.security import texts

_log = log.get(__name__)

#: Errors after which the driver is connected again.
_RECONNECT_ERRORS = ("NVMLError_GpuIsLost", "NVMLError_Uninitialized", "NVMLError_DriverNotLoaded", "NVMLError_Unknown")


#: Maximum characters of a name: NVML's own limit (NVML_DEVICE_NAME_V2_BUFFER_SIZE).
_MAX_NAME = 96
#: Bytes and degrees that no GPU has: such values are rejected.
_MAX_BYTES, _MAX_DEGREES = 1 << 50, 1_000
#: Characters of a PCI address, whose domain the kernel writes with four digits, and NVML with eight.
_ADDRESS = len("0000:03:00.0")


class Gpus:
    """The connection to the driver. It is opened by the first reading and kept. Not thread-safe."""

    def __init__(self, library: Any = pynvml) -> None:
        self._nvml = library
        self._open = False
        self._absence_logged = False
        #: Errors that were already logged.
        self._logged: set[str] = set()

    def read(self) -> tuple[list[MeasuredDevice], list[str]]:
        """Measures all GPUs. Returns the devices, and a sentence for each problem."""
        try:
            if not self._open:
                self._nvml.nvmlInit()
                self._open = True
            driver = _text(self._nvml.nvmlSystemGetDriverVersion())
            count = self._nvml.nvmlDeviceGetCount()
        except pynvml.NVMLError_LibraryNotFound:
            if not self._absence_logged:
                _log.info("no_nvidia_driver")
                self._absence_logged = True
            return [], []
        except (pynvml.NVMLError, UnicodeDecodeError) as error:
            self.close()
            return [], [f"the NVIDIA driver does not respond: {error}; run `nvidia-smi` for details"]
        devices: list[MeasuredDevice] = []
        problems: list[str] = []
        for index in range(count):
            try:
                devices.extend(list(self._gpu(index, driver, problems)))
            except pynvml.NVMLError as error:
                problems.append(f"gpu-{index} is left out: {error}")
                if type(error).__name__ in _RECONNECT_ERRORS:
                    self.close()
                    break
            except Exception as error:  # noqa: BLE001 one GPU with invalid values must not hide the others
                problems.append(f"gpu-{index} is left out: {error}")
                if str(error) not in self._logged:
                    self._logged.add(str(error))
                    _log.exception("gpu_left_out", index=index)
        return devices, problems

    def close(self) -> None:
        """Closes the connection to the driver. The next reading connects again."""
        if self._open:
            self._open = False
            try:
                self._nvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                _log.warning("nvml_not_closed", error=str(error))

    def _gpu(self, index: int, driver: str, problems: list[str]) -> Iterator[MeasuredDevice]:
        """Yields the GPU, or its MIG instances."""
        nvml, name = self._nvml, f"gpu-{index}"
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid, model = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
        temperature = self._optional(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        mode = self._optional(nvml.nvmlDeviceGetMigMode, handle)
        pci = self._optional(nvml.nvmlDeviceGetPciInfo, handle)
        address = "" if pci is None else _text(pci.busId).lower()[-_ADDRESS:]
        if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            rates = self._optional(nvml.nvmlDeviceGetUtilizationRates, handle)
            utilisation = None if rates is None else rates.gpu / 100
            yield self._device(name, handle, model, uuid, driver, temperature, utilisation=utilisation, address=address)
            return
        instances = 0
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
                continue
            instances += 1
            instance_uuid, instance_model = (
                _text(nvml.nvmlDeviceGetUUID(instance)),
                _text(nvml.nvmlDeviceGetName(instance)),
            )
            yield self._device(
                f"{name}-{number}",
                instance,
                instance_model,
                instance_uuid,
                driver,
                temperature,
                parent=uuid,
                address=address,
            )
        if not instances:
            problems.append(f"{name} ({model}) is left out: MIG is on and it has no instances")

    def _device(
        self,
        name: str,
        handle: Any,
        model: str,
        uuid: str,
        driver: str,
        temperature: int | None,
        *,
        utilisation: float | None = None,
        parent: str = "",
        address: str = "",
    ) -> MeasuredDevice:
        memory, kept = self._memory(handle)
        total = memory.total - kept
        if not 0 < total < _MAX_BYTES:
            raise ValueError(f"its driver reports {total:,} bytes of memory")
        if temperature is not None and not 0 <= temperature < _MAX_DEGREES:
            temperature = None
        return MeasuredDevice(
            name=name,
            kind=HardwareKind.GPU,
            model=model,
            total=total,
            free=min(max(memory.free, 0), total),
            uuid=uuid,
            driver=driver,
            parent=parent,
            processes=self._processes(handle),
            temperature=temperature,
            utilisation=utilisation,
            pci=address,
        )

    def _memory(self, handle: Any) -> tuple[Any, int]:
        """Returns the memory, and the bytes that the driver reserves; an old driver counts these as used."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)
            return memory, memory.reserved
        except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch):
            return self._nvml.nvmlDeviceGetMemoryInfo(handle), 0

    def _processes(self, handle: Any) -> tuple[DeviceProcess, ...]:
        """Returns the compute and graphics processes; a process that is both appears once."""
        nvml = self._nvml
        compute = (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetComputeRunningProcesses_v2)
        graphics = (nvml.nvmlDeviceGetGraphicsRunningProcesses_v3, nvml.nvmlDeviceGetGraphicsRunningProcesses_v2)
        found: dict[int, int | None] = {}
        for newer, older in (compute, graphics):
            listed = self._optional(newer, handle)
            for process in self._optional(older, handle) or () if listed is None else listed:
                found.setdefault(process.pid, process.usedGpuMemory)
        return tuple(DeviceProcess(pid, used) for pid, used in sorted(found.items()))

    def _optional(self, query: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the result of a query, or None when the GPU, the driver or the container does not support it."""
        try:
            return query(*arguments)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound):
            return None


def _text(value: str | bytes) -> str:
    """Returns a printable text; older versions of the library return bytes."""
    return texts.printable(value.decode(errors="replace") if isinstance(value, bytes) else value, _MAX_NAME)
