"""GPUs as the kernel lists them. The trees are those of amdgpu and i915, as their documentation describes them."""

from __future__ import annotations

from pathlib import Path

from app.devices import pci
from app.devices.device import DeviceProcess

GIB, MIB = 2**30, 2**20


def card(root: Path, address: str, vendor: str, **files: str) -> Path:
    folder = root / "sys/bus/pci/devices" / address
    (folder / "drm/renderD128").mkdir(parents=True)
    for name, text in {"vendor": vendor, "class": "0x030000", **files}.items():
        (folder / name).write_text(text + "\n")
    return folder


def descriptor(root: Path, pid: int, number: int, target: str, text: str) -> None:
    process = root / "proc" / str(pid)
    (process / "fd").mkdir(parents=True, exist_ok=True)
    (process / "fdinfo").mkdir(exist_ok=True)
    (process / "fd" / str(number)).symlink_to(target)
    (process / "fdinfo" / str(number)).write_text(text)


def test_a_gpu_of_amd_is_measured_by_its_driver(tmp_path: Path) -> None:
    used = {"mem_info_vram_total": str(16 * GIB), "mem_info_vram_used": str(3 * GIB), "gpu_busy_percent": "42"}
    folder = card(tmp_path, "0000:03:00.0", "0x1002", **used)
    (folder / "hwmon/hwmon3").mkdir(parents=True)
    (folder / "hwmon/hwmon3/temp1_input").write_text("51000\n")

    (found,) = pci.gpus(tmp_path)

    assert (found.address, found.vendor_name, found.total, found.used) == ("0000:03:00.0", "AMD", 16 * GIB, 3 * GIB)
    assert (found.utilisation, found.temperature) == (0.42, 51)
    assert found.node == tmp_path / "dev/dri/renderD128"


def test_figures_that_no_gpu_has_are_unknown(tmp_path: Path) -> None:
    wrong = {"mem_info_vram_total": "9" * 30, "mem_info_vram_used": "-1", "gpu_busy_percent": "many"}
    card(tmp_path, "0000:03:00.0", "0x1002", **wrong)
    (found,) = pci.gpus(tmp_path)
    assert (found.total, found.used, found.utilisation, found.temperature) == (None, None, None, None)


def test_consoles_of_servers_and_other_devices_are_no_gpus(tmp_path: Path) -> None:
    card(tmp_path, "0000:04:00.0", "0x1a03")
    card(tmp_path, "0000:05:00.0", "0x8086", **{"class": "0x020000"})
    card(tmp_path, "virtio0", "0x1002")
    assert pci.gpus(tmp_path) == []
    assert pci.gpus(tmp_path / "nothing") == []


def test_processes_are_found_by_their_descriptors(tmp_path: Path) -> None:
    """Two descriptors of one client count once; two clients of a process are added."""
    amd = "drm-driver:\tamdgpu\ndrm-client-id:\t{}\ndrm-pdev:\t0000:03:00.0\ndrm-memory-vram:\t{} KiB\n"
    descriptor(tmp_path, 7, 3, "/dev/dri/renderD128", amd.format(1, 2048))
    descriptor(tmp_path, 7, 4, "/dev/dri/renderD128", amd.format(1, 2048))
    descriptor(tmp_path, 7, 5, "/dev/dri/card0", amd.format(2, 1024))
    descriptor(tmp_path, 7, 6, "/tmp/renderD128", amd.format(9, 4096))
    xe = "drm-client-id: 1\ndrm-pdev: 0000:0a:00.0\ndrm-total-vram0: 5 MiB\ndrm-resident-vram0: 3 MiB\n"
    descriptor(tmp_path, 8, 3, "/dev/dri/renderD129", xe)
    descriptor(tmp_path, 9, 3, "/dev/dri/renderD129", "drm-pdev: ../../etc\n")

    assert pci.processes(tmp_path) == {
        "0000:03:00.0": (DeviceProcess(7, 3 * MIB),),
        "0000:0a:00.0": (DeviceProcess(8, 5 * MIB),),
    }
    assert pci.processes(tmp_path / "nothing") == {}
