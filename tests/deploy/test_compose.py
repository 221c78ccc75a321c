"""deploy/compose.yaml and deploy/Dockerfile: what they start exists, and they keep what docs/deployment.md promises."""

from __future__ import annotations

import importlib.util
import re
import stat
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.kernel.errors import InvalidSettings
from tests.deploy import compose_file, programs
from tests.deploy.compose_file import ROOT, ComposeService

OURS = [one for one in compose_file.services().values() if one.is_arriero]
LOCK = (ROOT / "deploy/requirements.lock").read_text(encoding="utf-8")


def test_each_program_of_an_installation_has_a_service() -> None:
    assert {tuple(one.command) for one in OURS} == {
        ("api",), ("control",), ("beat",), ("agent",), ("flower",), ("db", "upgrade"),
    }  # fmt: skip
    assert compose_file.services()["beat"].replicas == 2
    names = {profile: set(compose_file.services(profile)) for profile in ("cpu", "gpu")}
    assert names["cpu"] ^ names["gpu"] == {"agent", "agent-gpu"}
    assert {"postgres", "valkey", "prometheus", "grafana"} <= names["cpu"]


@pytest.mark.parametrize("service", OURS, ids=lambda service: service.name)
def test_its_command_its_health_check_and_its_settings_are_known(service: ComposeService, tmp_path: Path) -> None:
    programs.require_command(service.command)
    if service.health is not None:
        kind, program, *arguments = service.health
        assert (kind, program) == ("CMD", "arriero")
        programs.require_command(arguments)
    else:
        assert service.command == ["db", "upgrade"], "only what ends by itself has none"
    found = programs.loaded(service.environment, tmp_path).settings
    assert found.database_url is not None
    assert found.redis_url is not None
    assert "DATABASE_URL" not in {name.removeprefix("ARRIERO_") for name in service.environment}, "secrets are files"


def test_an_unknown_command_or_setting_would_be_found(tmp_path: Path) -> None:
    for arguments in (["apis"], ["health", "nothing"], ["api", "--no-such-option"], ["db", "upgrades"]):
        with pytest.raises(programs.UsageError):
            programs.require_command(arguments)
    with pytest.raises(InvalidSettings):
        programs.loaded({"ARRIERO_API__PORTT": "1"}, tmp_path)


@pytest.mark.parametrize("service", compose_file.services().values(), ids=lambda service: service.name)
def test_every_service_is_bounded_and_published_on_loopback_only(service: ComposeService) -> None:
    of = service.document
    assert of["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in of.get("ports", ()))
    assert "privileged" not in of
    assert ":latest" not in of["image"]
    assert service.health or of["healthcheck"] == {"disable": True}
    if service.is_arriero:
        assert of["read_only"] is True
        assert of["cap_drop"] == ["ALL"]
        writable = [*of.get("tmpfs", ()), *of.get("volumes", ())]
        assert any("/var/lib/arriero" in place for place in writable)
    known = {"postgres_password", "valkey_password", "valkey_conf", "database_url", "redis_url"}
    assert set(of.get("secrets", ())) <= known | {"grafana_password", "metrics_key"}


def test_workers_have_more_time_to_stop_than_their_steps_have() -> None:
    from app.kernel.settings import Settings

    drain = Settings().pools.drain_timeout
    for name in ("control", "agent", "agent-gpu"):
        assert compose_file.services()[name].grace > drain


def test_secrets_fit_together_and_are_made_once(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_secrets", ROOT / "deploy/compose/make_secrets.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    folder = tmp_path / "secrets"
    of_file = {Path(one["file"]).name for one in compose_file.document()["secrets"].values()}
    assert set(made.make(folder)) == of_file
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert made.make(folder) == []
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
    assert first["postgres_password"] in first["database_url"]
    assert f"requirepass {first['valkey_password']}" in first["valkey_conf"]
    assert "noeviction" in first["valkey_conf"]


def test_the_lock_has_what_the_image_installs_with_hashes_and_no_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)(?:\[[^\]]*\])?==([^ ;\\]+)", LOCK, re.MULTILINE))
    extras = ("mcp", "otel", "mail", "apprise", "smollm2", "consolidation")
    wanted = [*project["dependencies"], *(one for name in extras for one in project["optional-dependencies"][name])]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in listed, f"{name} is not in deploy/requirements.lock: see its head in docs/deployment.md"
        assert requirement.specifier.contains(listed[name], prereleases=True), f"{name}: the lock is older"
    for entry in re.split(r"\n(?=[a-z0-9])", LOCK.strip()):
        assert "--hash=sha256:" in entry, entry.splitlines()[0]
    assert "://" not in LOCK
    assert "--index-url" not in LOCK


def test_the_image_runs_as_a_user_without_rights_and_has_what_the_packages_need() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    assert "\nUSER 10001:10001\n" in text
    assert text.index("USER 10001") < text.index("ENTRYPOINT")
    assert "HEALTHCHECK" in text
    assert "--require-hashes" in text
    assert "GGML_NATIVE=OFF" in text, "an image runs on other machines than the one that builds it"
    copied = set(re.findall(r"^COPY (\w+) \w+$", text, re.MULTILINE))
    assert copied == {"app", "workers", "alembic", "models", "examples"}
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE):
        assert all(f"!{name}" in allowed for name in source.split()), source
