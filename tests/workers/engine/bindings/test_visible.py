"""What llama.cpp sees is compared with what a pool has reserved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.devices.device import GpuBackend, HardwareKind, MeasuredDevice
from app.kernel.errors import Unavailable
from workers.engine.bindings import visible
from workers.engine.bindings.visible import VisibleGpu

ARC = MeasuredDevice(
    "vulkan-1", HardwareKind.GPU, "Arc", 1, 1, uuid="vulkan-0000:0a:00.0", backend=GpuBackend.VULKAN, pci="0000:0a:00.0"
)
SOFTWARE = replace(ARC, name="software-0", pci="")
SEEN = VisibleGpu("Vulkan0", "Arc", 1, 1, "0000:0a:00.0")


def test_a_pool_on_its_own_devices_may_load() -> None:
    assert visible.difference([ARC], [SEEN]) == ""
    assert visible.difference([SOFTWARE, SOFTWARE], [replace(SEEN, pci="")] * 2) == ""
    assert visible.difference([], []) == ""


def test_another_device_is_refused() -> None:
    """Vulkan's numbers have changed since the agent listed the devices."""
    assert "the GPU at 0000:03:00.0 in the place of vulkan-1" in visible.difference(
        [ARC], [replace(SEEN, pci="0000:03:00.0")]
    )
    assert "sees CUDA0 in the place of vulkan-1" in visible.difference([ARC], [replace(SEEN, name="CUDA0")])
    assert "sees 0 GPUs (none); 1 are reserved (vulkan-1)" in visible.difference([ARC], [])
    assert "sees 1 GPUs (Arc); 0 are reserved (none)" in visible.difference([], [SEEN])


def test_a_pool_that_is_not_pinned_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible, "gpus", lambda: [SEEN, SEEN])
    with pytest.raises(Unavailable, match="not pinned to its devices"):
        visible.check([ARC])
