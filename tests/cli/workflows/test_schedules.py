"""`arriero schedules` with a running API."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from app.kernel.database import Database
from app.kernel.errors import InvalidInput, NotFound
from app.workflows import registry
from app.workflows.language import check
from tests.cli.conftest import Arriero

REST = "workflow: rest\nsteps: [{id: a, kind: noop}]\n"
NIGHTLY = "schedule: nightly\nworkflow: rest\ncron: 30 2 * * *\ntimezone: Europe/Berlin\njitter: 5m\n"


@pytest.fixture
def arriero(arriero: Arriero) -> Arriero:
    """`arriero schedules`."""
    return partial(arriero, "schedules")


@pytest.fixture
def file(database: Database, tmp_path: Path) -> Path:
    """A schedule whose workflow exists."""
    registry.put(database, "rest", check.parse(REST))
    path = tmp_path / "nightly.yaml"
    path.write_text(NIGHTLY)
    return path


def test_the_life_of_a_schedule(arriero: Arriero, file: Path) -> None:
    assert "nightly is active, next fire 20" in arriero("put", file).stdout
    assert "30 2 * * *, Europe/Berlin" in arriero("list").stdout
    assert arriero("pause", "nightly", "--reason", "holidays").stdout == "nightly is paused\n"
    run_id = arriero("trigger", "nightly", "--key", "k").stdout.strip()
    assert arriero("trigger", "nightly", "--key", "k").stdout.strip() == run_id
    skipped = arriero("trigger", "nightly", exits=4)
    assert f"run {run_id}" in " ".join(skipped.stderr.split())
    assert arriero("trigger", "nightly", "--force").stdout.strip() != run_id

    shown = arriero("show", "nightly", "--state", "fired", "--limit", "1")
    for part in ("paused: holidays", "rest, version the newest", "by hand"):
        assert part in shown.stdout
    assert "more: arriero schedules show nightly --cursor" in shown.stderr
    assert [f["run_id"] for f in json.loads(arriero("show", "nightly", "--json").stdout)["fires"]][-1] == run_id
    assert "nightly is active" in arriero("resume", "nightly").stdout
    assert arriero("delete", "nightly").stdout == "nightly is removed\n"
    assert json.loads(arriero("list", "--json").stdout) == {"schedules": []}
    with pytest.raises(NotFound):
        arriero("show", "nightly")


def test_a_preview_needs_no_server_for_a_file(arriero: Arriero, file: Path) -> None:
    of_file = json.loads(arriero("preview", file, "-n", "3", "--json").stdout)["fires"]
    arriero("put", file)
    stored = json.loads(arriero("preview", "nightly", "-n", "3", "--json").stdout)["fires"]

    assert [fire["at"] for fire in stored] == [fire["at"] for fire in of_file]
    assert len(arriero("preview", "nightly", "-n", "2").stdout.splitlines()) == 2
    assert "with jitter" in arriero("preview", "nightly").stdout


def test_a_rejected_schedule_is_reported_with_its_line(arriero: Arriero, file: Path) -> None:
    file.write_text(NIGHTLY.replace("workflow: rest", "workflow: rust"))
    with pytest.raises(InvalidInput, match=r"workflow \(line 2\).*did you mean 'rest'"):
        arriero("put", file)
