"""
The Vulkan loader of this machine: a program that lists its physical devices.

    python -m app.devices.vulkan.loader

Each line of standard input is a question; each line of standard output is a JSON list of all physical devices, measured
now, or `{"error": …}`. It ends with its input.

It runs as its own process, because a driver that crashes or hangs must not take its caller along. It creates an
instance and no device: nothing is allocated on a GPU.
The devices have the order in which every other process with the same environment sees them: the number of a device is
its number in `GGML_VK_VISIBLE_DEVICES`.

Structures and numbers are those of vulkan_core.h, version 1.1, with VK_EXT_pci_bus_info, VK_EXT_memory_budget and
VK_KHR_driver_properties, each asked only where the device has it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes.util import find_library
from typing import Any, ClassVar
from uuid import UUID

#: Names of the loader's library, the system's own first.
_LIBRARIES = ("libvulkan.so.1", "libvulkan.so", "libvulkan.1.dylib")
_VERSION = 1 << 22 | 1 << 12  # VK_API_VERSION_1_1
#: Values of sType.
_APPLICATION, _INSTANCE = 0, 1
_PROPERTIES, _MEMORY, _IDS = 1000059001, 1000059006, 1000071004
_DRIVER, _PCI, _BUDGET = 1000196000, 1000212000, 1000237000
_DEVICE_LOCAL, _MAX_HEAPS, _MAX_TYPES, _MAX_DEVICES = 1, 16, 32, 64
_KINDS = {1: "integrated", 2: "discrete", 3: "virtual", 4: "software"}
_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64


class VulkanFailed(Exception):
    """Vulkan cannot be used; the message is the reason."""


class _Structure(ctypes.Structure):
    """A structure that begins with its type and the next one of a chain."""

    kind: ClassVar[int]

    @classmethod
    def of(cls, following: ctypes.Structure | None = None, **values: Any) -> Any:
        made = cls(**values)
        made.s_type = cls.kind
        made.following = None if following is None else ctypes.addressof(following)
        return made


_HEAD = (("s_type", _U32), ("following", ctypes.c_void_p))


class _Application(_Structure):
    kind = _APPLICATION
    _fields_ = (
        *_HEAD,
        *(("name", ctypes.c_char_p), ("version", _U32), ("engine", ctypes.c_char_p)),
        *(("engine_version", _U32), ("api", _U32)),
    )


class _Instance(_Structure):
    kind = _INSTANCE
    _fields_ = (
        *_HEAD,
        *(("flags", _U32), ("application", ctypes.c_void_p)),
        *(("layer_count", _U32), ("layers", ctypes.c_void_p)),
        *(("extension_count", _U32), ("extensions", ctypes.c_void_p)),
    )


class _Properties(_Structure):
    kind = _PROPERTIES
    _fields_ = (
        *_HEAD,
        *(("api", _U32), ("version", _U32), ("vendor", _U32), ("device", _U32), ("type", _U32)),
        *(("name", ctypes.c_char * 256), ("cache", ctypes.c_uint8 * 16)),
        ("limits", _U64 * 128),  # more than its limits and sparse properties: 524 bytes
    )


class _Ids(_Structure):
    kind = _IDS
    _fields_ = (
        *_HEAD,
        *(("device", ctypes.c_uint8 * 16), ("driver", ctypes.c_uint8 * 16), ("luid", ctypes.c_uint8 * 8)),
        *(("mask", _U32), ("luid_valid", _U32)),
    )


class _Driver(_Structure):
    kind = _DRIVER
    _fields_ = (
        *_HEAD,
        *(
            ("id", _U32),
            ("name", ctypes.c_char * 256),
            ("info", ctypes.c_char * 256),
            ("conformance", ctypes.c_uint8 * 4),
        ),
    )


class _Pci(_Structure):
    kind = _PCI
    _fields_ = (*_HEAD, ("domain", _U32), ("bus", _U32), ("device", _U32), ("function", _U32))


class _Budget(_Structure):
    kind = _BUDGET
    _fields_ = (*_HEAD, ("budget", _U64 * _MAX_HEAPS), ("usage", _U64 * _MAX_HEAPS))


class _Heap(ctypes.Structure):
    _fields_ = (("size", _U64), ("flags", _U32))


class _Memory(_Structure):
    kind = _MEMORY
    _fields_ = (
        *_HEAD,
        *(("type_count", _U32), ("types", _U32 * 2 * _MAX_TYPES)),
        *(("heap_count", _U32), ("heaps", _Heap * _MAX_HEAPS)),
    )


class _Extension(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 256), ("version", _U32))


class VulkanLoader:
    """The loader's library, with one instance."""

    def __init__(self) -> None:
        """Raises VulkanFailed."""
        self._vulkan = _library()
        application = _Application.of(api=_VERSION)
        made, self._instance = _Instance.of(application=ctypes.addressof(application)), ctypes.c_void_p()
        if code := self._vulkan.vkCreateInstance(ctypes.byref(made), None, ctypes.byref(self._instance)):
            raise VulkanFailed(f"the Vulkan loader finds no driver that works (VkResult {code})")

    def devices(self) -> list[dict[str, Any]]:
        """Return the physical devices in Vulkan's order. Raises VulkanFailed."""
        count, handles = _U32(_MAX_DEVICES), (ctypes.c_void_p * _MAX_DEVICES)()
        code = self._vulkan.vkEnumeratePhysicalDevices(self._instance, ctypes.byref(count), handles)
        if code < 0:
            raise VulkanFailed(f"the Vulkan drivers do not list their devices (VkResult {code})")
        return [self._device(number, ctypes.c_void_p(handles[number])) for number in range(count.value)]

    def _device(self, number: int, handle: ctypes.c_void_p) -> dict[str, Any]:
        has = self._extensions(handle)
        pci, budget = _Pci.of(), _Budget.of()
        driver = _Driver.of(pci if "VK_EXT_pci_bus_info" in has else None)
        ids = _Ids.of(driver if "VK_KHR_driver_properties" in has else pci if "VK_EXT_pci_bus_info" in has else None)
        found = _Properties.of(ids)
        self._vulkan.vkGetPhysicalDeviceProperties2(handle, ctypes.byref(found))
        memory = _Memory.of(budget if "VK_EXT_memory_budget" in has else None)
        self._vulkan.vkGetPhysicalDeviceMemoryProperties2(handle, ctypes.byref(memory))
        kind = _KINDS.get(found.type, "other")
        heaps = [
            (memory.heaps[index].size, budget.budget[index])
            for index in range(min(memory.heap_count, _MAX_HEAPS))
            if memory.heaps[index].flags & _DEVICE_LOCAL or kind == "integrated"
        ]
        name = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.{pci.function}"
        return {
            "number": number,
            "name": _text(found.name),
            "kind": kind,
            "vendor": found.vendor,
            "uuid": str(UUID(bytes=bytes(ids.device))),
            "pci": name if "VK_EXT_pci_bus_info" in has else "",
            "driver": " ".join(part for part in (_text(driver.name), _text(driver.info)) if part),
            "total": sum(size for size, _ in heaps),
            "free": sum(min(free, size) for size, free in heaps) if "VK_EXT_memory_budget" in has else None,
        }

    def _extensions(self, handle: ctypes.c_void_p) -> set[str]:
        count = _U32()
        self._vulkan.vkEnumerateDeviceExtensionProperties(handle, None, ctypes.byref(count), None)
        found = (_Extension * count.value)()
        self._vulkan.vkEnumerateDeviceExtensionProperties(handle, None, ctypes.byref(count), found)
        return {_text(one.name) for one in found}


def main() -> int:
    """Answer lines until the input ends. Returns the exit code."""
    loader: VulkanLoader | None = None
    for _ in sys.stdin:
        try:
            loader = loader or VulkanLoader()
            answer: object = loader.devices()
        except VulkanFailed as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


def _library() -> Any:
    for name in (*_LIBRARIES, find_library("vulkan") or ""):
        try:
            library = ctypes.CDLL(name) if name else None
        except OSError:
            continue
        if library is not None and hasattr(library, "vkGetPhysicalDeviceProperties2"):
            pointer = ctypes.c_void_p
            library.vkCreateInstance.argtypes = [pointer, pointer, pointer]
            library.vkEnumeratePhysicalDevices.argtypes = [pointer, pointer, pointer]
            library.vkEnumerateDeviceExtensionProperties.argtypes = [pointer, ctypes.c_char_p, pointer, pointer]
            library.vkGetPhysicalDeviceProperties2.argtypes = [pointer, pointer]
            library.vkGetPhysicalDeviceMemoryProperties2.argtypes = [pointer, pointer]
            return library
    raise VulkanFailed("the Vulkan loader is not installed (Debian: apt install libvulkan1)")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main())
