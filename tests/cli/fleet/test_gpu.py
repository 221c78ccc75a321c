"""`arriero gpu check`: each thing that is missing has a line that says what to type. The GPUs are values."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.fleet.gpu import findings
from app.devices import llama_build
from app.devices.device import GpuBackend, Inventory
from app.devices.pci import PciGpu
from app.devices.vulkan.listing import PhysicalDevice

NOTHING = Inventory(())
AMD = PciGpu("0000:03:00.0", 0x1002, "amdgpu", None, None, None, None, None)
NVIDIA = PciGpu("0000:c1:00.0", 0x10DE, "nvidia", None, None, None, None, None)
LLVMPIPE = PhysicalDevice(0, "llvmpipe", "software", 0x10005, "6d65", "", "llvmpipe", 2**31, None)


def wrong(card: PciGpu, *, in_container: bool = False) -> str:
    found = findings([card], NOTHING, [], [], in_container=in_container)
    return "\n".join(f"{one.what}: {one.mend}" for one in found if not one.ok)


@pytest.mark.parametrize("in_container", [True, False])
def test_what_is_missing_is_named_with_what_to_type(in_container: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_build, "backends", set)
    amd, nvidia = (wrong(card, in_container=in_container) for card in (AMD, NVIDIA))
    assert "made no node in /dev/dri" in amd
    assert "-DGGML_VULKAN=ON" in amd
    assert ("--device /dev/dri" in amd, "--gpus all" in nvidia) == (in_container, in_container)
    assert "the NVIDIA driver (nvidia) does not answer" in nvidia
    assert "-DGGML_CUDA=ON" in nvidia


def test_a_node_that_this_user_may_not_use_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.VULKAN})
    card = PciGpu("0000:03:00.0", 0x1002, "amdgpu", tmp_path / "renderD128", None, None, None, None)
    assert "usermod -aG render" in wrong(card)
    (tmp_path / "renderD128").touch()
    assert wrong(card) == ""


def test_a_software_device_is_no_fault_and_is_not_used() -> None:
    found = list(findings([], NOTHING, [LLVMPIPE], [], in_container=False))
    assert all(one.ok for one in found)
    assert any("is not used unless fleet.software allows it" in one.what for one in found)
