"""deploy/systemd: units start commands that exist, with known settings, and give up what they do not need."""

from __future__ import annotations

import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from app.kernel.settings import Settings
from app.kernel.units import durations
from tests.deploy import programs

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
UNITS = sorted(FOLDER.glob("*.service"))
#: What each unit has, whatever it runs.
HARDENED = {
    "CapabilityBoundingSet": "",
    "NoNewPrivileges": "true",
    "ProtectSystem": "strict",
    "ProtectHome": "true",
    "PrivateTmp": "true",
    "ProtectKernelModules": "true",
    "RestrictNamespaces": "true",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "SystemCallArchitectures": "native",
}
#: Most exposure that `systemd-analyze security` may report, in tenths.
EXPOSURE = 25


def entries(unit: Path, section: str) -> dict[str, str]:
    found: dict[str, str] = {}
    here = ""
    for line in unit.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            here = line.strip("[]")
        elif here == section and "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name] = value
    return found


def test_each_program_of_a_host_has_a_unit() -> None:
    assert [unit.stem for unit in UNITS] == [f"arriero-{name}" for name in ("agent", "api", "beat", "control")]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_starts_a_known_command_and_gives_up_what_it_does_not_need(unit: Path) -> None:
    service = entries(unit, "Service")
    path, *words = service["ExecStart"].split()
    assert path == "/opt/arriero/bin/arriero"
    programs.require_command(words)
    assert {name: service.get(name) for name in HARDENED} == HARDENED
    assert service["EnvironmentFile"] == "/etc/arriero/environment"
    assert service["KillSignal"] == "SIGTERM", "never SIGQUIT"
    if words == ["agent"]:
        assert "PrivateDevices" not in service, "GPUs are devices"
        assert "ProtectClock" not in service, "it closes all devices"
        assert service["KillMode"] == "process", "pools outlive their agent"
    else:
        assert service["PrivateDevices"] == "true"
    if words in (["agent"], ["control"]):
        drain = Settings().pools.drain_timeout
        assert durations.parse(f"{service['TimeoutStopSec']}s") >= drain + timedelta(seconds=10)
    assert entries(unit, "Install")["WantedBy"] == "multi-user.target"


def test_the_example_of_the_environment_is_accepted(tmp_path: Path) -> None:
    text = (FOLDER / "environment.example").read_text(encoding="utf-8")
    given, proposed = {}, {}
    for line in text.splitlines():
        name, mark, value = line.removeprefix("#").partition("=")
        if mark and name.startswith("ARRIERO_"):
            (proposed if line.startswith("#") else given)[name] = value
    assert {"ARRIERO_DATABASE_URL", "ARRIERO_REDIS_URL"} <= given.keys()
    assert programs.loaded(given, tmp_path).settings.pools.models == ()
    assert proposed
    programs.loaded(given | proposed, tmp_path)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_the_unit_and_finds_little_exposed(unit: Path, tmp_path: Path) -> None:
    here = tmp_path / unit.name
    here.write_text(unit.read_text(encoding="utf-8").replace("/opt/arriero/bin/arriero", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(here)], capture_output=True, text=True, timeout=60, check=False
    )
    about_it = [line for line in verified.stderr.splitlines() if unit.name in line]
    assert verified.returncode == 0, verified.stderr
    assert about_it == []
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(unit)]
    scored = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert scored.returncode == 0, scored.stdout[-300:]
