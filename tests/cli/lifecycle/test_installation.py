"""What is known of a data directory without asking anybody: its holder, its record, its processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.cli.client import url_of
from app.cli.lifecycle import installation
from app.cli.processes import records
from app.cli.processes.records import TreeRecord
from app.kernel import clock
from app.kernel.errors import Conflict, Unavailable
from app.kernel.processes import pid_file
from app.kernel.processes.data_directory import DataDirectory, DirectoryHolder, find_holder
from app.kernel.processes.pid_file import PidRecord, birth
from app.kernel.sections.servers import ApiSettings
from app.kernel.settings import Settings


def write_pid(directory: Path, name: str, born: str) -> None:
    (directory / "run").mkdir(exist_ok=True)
    pid_file.write(
        directory / "run" / f"{name}.pid", PidRecord(name, os.getpid(), born, "", 15, os.getpid(), "another")
    )


def held(directory: Path) -> DataDirectory:
    return DataDirectory(directory, now=clock.now(), command="arriero up")


def test_a_pid_that_another_process_has_got_is_no_process(tmp_path: Path) -> None:
    write_pid(tmp_path, "api", birth(os.getpid()) or "")
    write_pid(tmp_path, "control", "the birth of a process before the last boot")

    found = installation.read(tmp_path, clock.now())
    assert [process.name for process in found.processes] == ["api"]
    assert found.running("api") is not None
    assert found.processes[0].memory > 1024 * 1024
    assert found.processes[0].uptime > 0


def test_a_record_counts_only_for_the_process_that_holds_the_directory(tmp_path: Path) -> None:
    with held(tmp_path):
        TreeRecord(os.getpid(), "this", "1").save(tmp_path)
        assert installation.read(tmp_path, clock.now()).record == TreeRecord(os.getpid(), "this", "1")
        TreeRecord(os.getpid() + 1, "of a killed one", "1").save(tmp_path)
        assert installation.read(tmp_path, clock.now()).record is None
        for text in ("", "[1]", "{", '{"pid": 1, "unknown": 2}', "[" * 70_000):
            (tmp_path / "run" / "up.json").write_text(text)
            assert records.running(tmp_path) is None
    TreeRecord(os.getpid(), "this", "1").save(tmp_path)
    assert records.running(tmp_path) is None, "nobody holds the directory"


def test_a_holder_in_another_container_is_not_mistaken_for_a_process_here(tmp_path: Path) -> None:
    with held(tmp_path):
        holder = find_holder(tmp_path)
        assert holder is not None
        assert installation.visible_process(tmp_path, holder).pid == os.getpid()
        elsewhere = DirectoryHolder(holder.pid, holder.since, holder.command, "another birth")
        with pytest.raises(Conflict, match="cannot be seen here"):
            installation.visible_process(tmp_path, elsewhere)
        # As written by a version without births.
        assert installation.process_of(DirectoryHolder(holder.pid, holder.since, holder.command)) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_the_directory_of_another_user_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "arriero.lock").touch(0o000)
    with pytest.raises(Unavailable, match="cannot be read"):
        installation.holder_of(tmp_path)


def test_a_request_for_a_restart_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError):
        records.take_request(tmp_path)
    records.request_restart(tmp_path, ["api"])
    assert records.take_request(tmp_path) == ["api"]
    with pytest.raises(FileNotFoundError):
        records.take_request(tmp_path)


def test_commands_find_the_port_that_up_has_chosen(tmp_path: Path) -> None:
    """Unless a port is set."""
    free, fixed = ApiSettings(port=0), ApiSettings(port=9000)
    with held(tmp_path):
        TreeRecord(os.getpid(), "this", "1", api="http://127.0.0.1:4321").save(tmp_path)
        assert url_of(Settings(data_dir=tmp_path, api=free)) == "http://127.0.0.1:4321"
        assert url_of(Settings(data_dir=tmp_path)) == "http://127.0.0.1:4321"
        assert url_of(Settings(data_dir=tmp_path, api=fixed)) == "http://127.0.0.1:9000"
    assert url_of(Settings(data_dir=tmp_path)) == "http://127.0.0.1:8470"


def test_nothing_runs_on_a_new_directory(tmp_path: Path) -> None:
    """`status` says so with its exit code; `down` finds nothing to do, and creates nothing."""
    options = ["--data-dir", str(tmp_path / "none"), "--set", "api.url=http://127.0.0.1:9"]
    status = CliRunner().invoke(app, [*options, "status", "--json"])
    assert status.exit_code == 5
    assert json.loads(status.stdout)["state"] == "down"
    down = CliRunner().invoke(app, [*options, "down"])
    assert down.exit_code == 0
    assert "nothing runs" in down.stderr
    restart = CliRunner().invoke(app, [*options, "restart"])
    assert isinstance(restart.exception, Unavailable)
    assert not (tmp_path / "none").exists()
