"""
Pinning: the variables that make only some devices visible to a process.

CUDA knows a GPU by its UUID. Vulkan knows it by a number only, so a process that computes there checks the devices that
it sees. A process without a GPU sees none: llama.cpp would make a driver's context on each.
Metal has one device and no variable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from app.devices.device import GpuBackend, MeasuredDevice

#: What hides every GPU.
NO_GPUS: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "GGML_VK_VISIBLE_DEVICES": "",
}


def environment(devices: Iterable[MeasuredDevice]) -> dict[str, str]:
    """Return the variables with which a process sees exactly these GPUs, in this order; other devices do not count."""
    found = [device for device in devices if device.uuid]
    cuda = [device.uuid for device in found if device.backend is GpuBackend.CUDA]
    vulkan = [str(device.number) for device in found if device.backend is GpuBackend.VULKAN]
    return {**NO_GPUS, "CUDA_VISIBLE_DEVICES": ",".join(cuda), "GGML_VK_VISIBLE_DEVICES": ",".join(vulkan)}
