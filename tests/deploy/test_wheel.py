"""The wheel and the sdist: complete, without anything else, and the same from a checkout and from the sdist."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Folders of the wheel, by those of the repository.
SHIPPED = {"app": "app", "workers": "workers"} | {
    name: f"app/_shipped/{name}" for name in ("alembic", "models", "examples")
}
#: What the sdist leaves out: pictures, CI, and what only a checkout needs.
NOT_IN_SDIST = (".ci/", ".gitignore", "docs/screenshots/", "docs/")


def build(source: Path, target: Path, *kinds: str) -> None:
    options = [option for kind in kinds for option in ("-t", kind)]
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target), *options]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build(ROOT, folder, "wheel", "sdist")
    return folder


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("it is no checkout: nothing says which files belong to it")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def in_wheel(name: str) -> str | None:
    folder = name.partition("/")[0]
    return f"{SHIPPED[folder]}/{name.partition('/')[2]}" if folder in SHIPPED else None


def package_files(wheel: Mapping[str, str]) -> set[str]:
    return {name for name in wheel if not name.partition("/")[0].endswith(".dist-info")}


def test_the_wheel_has_all_that_the_packages_read_and_nothing_else(built: Path, tracked: list[str]) -> None:
    (wheel,) = built.glob("*.whl")
    expected = {place for name in tracked if (place := in_wheel(name))}
    assert package_files(contents(wheel)) == expected
    needed = {
        "app/_shipped/alembic/env.py",
        "app/_shipped/alembic/script.py.mako",
        "app/_shipped/models/catalog.toml",
        "app/api/ui/static/vendor/uPlot.iife.min.js",
        "app/api/ui/templates/base.html",
        "app/cli/starters/generate.yaml",
        "app/governance/rules/builtin.yaml",
        "app/workflows/library/support-triage.yaml",
        "workers/programs.py",
    }
    assert needed <= expected


def test_its_metadata_say_what_it_needs_and_name_its_command(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (about,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(about).decode()
        entry_points = archive.read(about.replace("METADATA", "entry_points.txt")).decode()
    assert "arriero = app.__main__:main" in entry_points
    for line in ("Requires-Python: >=3.11", "Provides-Extra: embedded", "License-Expression: Apache-2.0"):
        assert line in metadata.splitlines()
    assert str(ROOT) not in metadata


def test_the_wheel_of_the_sdist_is_the_same(built: Path, tracked: list[str], tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    left_out = [name for name in tracked if not (source / name).is_file()]
    assert [name for name in left_out if not name.startswith(NOT_IN_SDIST)] == []
    assert (source / "docs/operations.md").is_file()
    build(source, tmp_path / "again", "wheel")
    (wheel,), (again,) = built.glob("*.whl"), (tmp_path / "again").glob("*.whl")
    first, second = contents(wheel), contents(again)
    assert {name: first[name] for name in package_files(first)} == {
        name: second[name] for name in package_files(second)
    }
