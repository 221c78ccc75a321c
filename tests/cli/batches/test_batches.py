"""`arriero files` and `arriero batches` with a running API. The job of batches runs where a test calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.catalog import files
from app.inference.batches.advance import Batches
from app.kernel.errors import Conflict, InvalidInput, NotFound
from app.kernel.settings import Settings
from app.workflows.runs.service import Runs
from tests.cli.conftest import Arriero

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "smollm2:135m", "messages": [{"role": "user", "content": "Hello"}]}}  # fmt: skip


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "[red]requests.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    return path


@pytest.fixture
def job(runs: Runs, settings: Settings) -> Batches:
    catalog = files.read_catalog()
    return Batches(runs, lambda: catalog, settings.files, settings.batches, "control@here/1/x")


def test_the_life_of_a_file(arriero: Arriero, requests: Path, tmp_path: Path) -> None:
    file_id = arriero("files", "upload", requests, "--purpose", "user_data").stdout.strip()
    listed = arriero("files", "list").stdout
    assert file_id in listed
    assert "[red]requests.jsonl" in listed, "names are no markup"
    assert json.loads(arriero("files", "show", file_id).stdout)["purpose"] == "user_data"
    assert json.loads(arriero("files", "content", file_id).stdout) == LINE
    arriero("files", "content", file_id, "-o", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == requests.read_bytes()
    assert "deleted" in arriero("files", "delete", file_id).stdout
    assert json.loads(arriero("files", "list", "--json").stdout)["data"] == []
    with pytest.raises(NotFound):
        arriero("files", "show", file_id)


def test_the_life_of_a_batch(arriero: Arriero, requests: Path, job: Batches) -> None:
    batch_id = arriero("batches", "create", requests, "--metadata", "job=[b]night", "--window", "1h").stdout.strip()
    job.advance_all()
    shown = arriero("batches", "show", batch_id).stdout
    for part in ("in_progress", "0 of 1 done", "smollm2:135m", "metadata.job", "[b]night"):
        assert part in shown
    with pytest.raises(Conflict, match="no results yet"):
        arriero("batches", "results", batch_id)
    assert arriero("batches", "cancel", batch_id).stdout == f"{batch_id} is cancelling\n"
    for _ in range(3):
        job.advance_all()
    assert "cancelled" in arriero("batches", "list").stdout
    assert "--errors" in arriero("batches", "results", batch_id).stderr
    (line,) = arriero("batches", "results", batch_id, "--errors").stdout.splitlines()
    assert json.loads(line)["error"]["code"] == "batch_cancelled"


def test_what_is_wrong_with_a_file_is_shown(arriero: Arriero, requests: Path, job: Batches) -> None:
    requests.write_text(requests.read_text() * 2)
    file_id = arriero("files", "upload", requests).stdout.strip()
    batch_id = arriero("batches", "create", file_id).stdout.strip()
    job.advance_all()
    shown = arriero("batches", "show", batch_id).stdout
    assert "duplicate_custom_id" in shown
    assert "failed" in shown

    requests.write_text("{}")
    with pytest.raises(InvalidInput, match="no 'url'"):
        arriero("batches", "create", requests)
    with pytest.raises(InvalidInput, match="not a duration"):
        arriero("batches", "create", file_id, "--window", "soon")
