"""`arriero gpu check`: each thing that is missing has a line that says what to type. The GPUs are values."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.cli.fleet.gpu import GpuFinding, findings
from app.devices import llama_build
from app.devices.device import GpuBackend, HardwareKind, Inventory, MeasuredDevice
from app.devices.pci import PciGpu
from app.devices.vulkan.listing import PhysicalDevice

NOTHING = Inventory(())
AMD = PciGpu("0000:03:00.0", 0x1002, "amdgpu", None, None, None, None, None)
NVIDIA = PciGpu("0000:c1:00.0", 0x10DE, "nvidia", None, None, None, None, None)
LLVMPIPE = PhysicalDevice(0, "llvmpipe", "software", 0x10005, "6d65", "", "llvmpipe", 2**31, None)


CARD = MeasuredDevice("gpu-0", HardwareKind.GPU, "NVIDIA L4", 9, 9, uuid="GPU-1", pci=NVIDIA.address)


def checked(
    card: PciGpu,
    *gpus: MeasuredDevice,
    vulkan: tuple[PhysicalDevice, ...] = (),
    in_container: bool = False,
    root: Path = Path("/nowhere"),
) -> list[GpuFinding]:
    return list(findings([card], Inventory(gpus), list(vulkan), [], in_container=in_container, root=root))


def wrong(card: PciGpu, *gpus: MeasuredDevice, **given: Any) -> str:
    return "\n".join(f"{one.what}: {one.mend}" for one in checked(card, *gpus, **given) if not one.ok)


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """A root with the nodes that CUDA needs."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    return tmp_path


@pytest.mark.parametrize("in_container", [True, False])
def test_what_is_missing_is_named_with_what_to_type(
    in_container: bool, nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_build, "backends", set)
    amd, nvidia = (wrong(card, in_container=in_container, root=nodes) for card in (AMD, NVIDIA))
    assert "made no node in /dev/dri" in amd
    assert "-DGGML_VULKAN=ON" in amd
    assert "glslc" in amd, "what the build needs"
    assert ("--device /dev/dri" in amd, "--gpus all" in nvidia) == (in_container, in_container)
    assert "the NVIDIA driver (nvidia) does not answer" in nvidia
    assert "-DGGML_CUDA=ON" in nvidia
    assert "nvcc" in nvidia


def test_one_gpu_that_answers_does_not_speak_for_another(nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.CUDA})
    assert wrong(NVIDIA, CARD, root=nodes) == ""
    second = replace(NVIDIA, address="0000:c2:00.0")
    assert "NVIDIA GPU at 0000:c2:00.0: the NVIDIA driver (nvidia) does not answer for it" in wrong(
        second, CARD, root=nodes
    )
    instance = replace(CARD, name="gpu-0-1", uuid="MIG-1", parent="GPU-1")
    assert wrong(NVIDIA, instance, root=nodes) == "", "its instances answer for a partitioned GPU"


@pytest.mark.parametrize(
    ("gone", "expected", "in_container"),
    [
        ("nvidia0", "dev/nvidia* for it: sudo nvidia-modprobe", False),
        ("nvidiactl", "dev/nvidia* for it: start the container with --gpus all", True),
        ("nvidia-uvm", "nvidia-uvm, which CUDA needs: sudo nvidia-modprobe -c 0 -u", False),
    ],
)
def test_a_node_of_nvidia_that_is_missing_is_named(
    gone: str, expected: str, in_container: bool, nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.CUDA})
    (nodes / "dev" / gone).unlink()
    answering = [CARD] if gone == "nvidia-uvm" else []  # NVML needs the others
    assert expected in wrong(NVIDIA, *answering, root=nodes, in_container=in_container)


def test_nodes_that_this_user_may_not_use_are_named(nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/nvidia* and /dev/kfd, not only /dev/dri. The super-user may use each file, so the answer is set."""
    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.CUDA, GpuBackend.VULKAN})
    (nodes / "dev/kfd").touch()
    render = nodes / "dev/renderD128"
    render.touch()
    refused: set[str] = set()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name not in refused)
    amd = replace(AMD, node=render)
    assert wrong(amd) == wrong(NVIDIA, CARD, root=nodes) == ""
    refused |= {"kfd", "nvidia0"}
    assert "this user may not use" in wrong(amd, root=nodes)
    assert "--device /dev/dri --device" in wrong(amd, root=nodes, in_container=True)
    assert f"chmod a+rw {nodes}/dev/nvidia0" in wrong(NVIDIA, CARD, root=nodes)


def test_a_build_for_vulkan_beside_a_gpu_of_nvidia_is_told_of_cuda(
    nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.VULKAN})
    found = checked(NVIDIA, CARD, root=nodes)
    assert all(one.ok for one in found), "it is used"
    (hint,) = (one for one in found if "with Vulkan" in one.what)
    assert "-DGGML_CUDA=ON" in hint.mend
    assert not any("with Vulkan" in one.what for one in checked(AMD))


def test_another_driver_than_nvidias_is_named(nodes: Path) -> None:
    assert "bound to the driver nouveau" in wrong(replace(NVIDIA, driver="nouveau"), root=nodes)


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
