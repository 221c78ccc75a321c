"""`arriero logs`: lines of several processes by time, what is left out, and logs that are rotated while followed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.cli import app
from app.cli.lifecycle import log_lines, logs
from app.cli.lifecycle.log_lines import LogLine
from app.kernel.errors import InvalidInput, NotFound
from app.kernel.processes import log_files, pid_file
from app.kernel.processes.pid_file import PidRecord

AT = datetime(2026, 11, 22, 16, 20, 45, 123000, tzinfo=UTC)


def line(event: str, second: int, **more: object) -> str:
    at = AT.replace(second=second).isoformat().replace("+00:00", "Z")
    return json.dumps({**more, "event": event, "level": "info", "timestamp": at})


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory with logs of two programs, a server and two pools, one of which runs."""
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "api.log").write_text(f"{line('api_one', 1)}\n{line('api_three', 3)}\n")
    (folder / "control.log").write_text(f"{line('control_two', 2)}\nTraceback: of two\n{line('control_four', 4)}\n")
    (folder / "pool.0192-aaaa11.log").write_text(f"{line('pool_old', 0)}\n")
    (folder / "pool.0192-bbbb22.log").write_text(f"{line('pool_new', 5)}\nunfinished")
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "server.log").write_text("2026-11-22 16:20:02.500 UTC [7] LOG:  ready\n")
    (tmp_path / "run" / "pools").mkdir(parents=True)
    record = PidRecord("pool alpha:1", 1, "never", "", 15, 1, "never")
    pid_file.write(tmp_path / "run" / "pools" / "0192-bbbb22@3.pid", record)
    return tmp_path


def printed(data_dir: Path, *arguments: str, exits: int = 0) -> str:
    result: Result = CliRunner().invoke(app, ["--data-dir", str(data_dir), "logs", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exits, result.output
    return result.stdout


def test_logs_are_merged_by_time_and_a_traceback_stays_with_its_line(data_dir: Path) -> None:
    found = [text.partition(" | ") for text in printed(data_dir).splitlines()]

    assert [name for name, _, _ in found] == [
        *("pool-aaaa11", "api", "control", "control", "postgres", "api", "control", "pool-bbbb22", "pool-bbbb22"),
    ]
    assert found[3][2] == "Traceback: of two"
    assert json.loads(found[1][2])["event"] == "api_one", "a line is as in the file"


def test_one_process_is_printed_as_in_its_file(data_dir: Path) -> None:
    assert printed(data_dir, "api") == (data_dir / "logs" / "api.log").read_text()
    assert printed(data_dir, "api", "-n", "1") == line("api_three", 3) + "\n"
    assert printed(data_dir, "api", "-n", "0") == ""


@pytest.mark.parametrize("name", ["pool-bbbb22", "alpha:1", "bbbb22", "0192-bbbb22"])
def test_a_pool_is_found_by_its_model_and_its_id(data_dir: Path, name: str) -> None:
    assert printed(data_dir, name).endswith("unfinished\n")
    assert "pool_old" not in printed(data_dir, name)


def test_pools_are_found_together(data_dir: Path) -> None:
    assert [text.partition(" ")[0] for text in printed(data_dir, "pool", "-n", "2").splitlines()] == ["pool-bbbb22"] * 2


def test_an_unknown_process_is_refused_with_those_that_have_logs(data_dir: Path) -> None:
    with pytest.raises(NotFound, match="no log of a process 'nope'; there are: postgres, api, control, pool"):
        printed(data_dir, "nope")


def test_since_prints_all_lines_from_an_instant_on(data_dir: Path) -> None:
    found = printed(data_dir, "--since", "2026-11-22T16:20:03Z").splitlines()

    assert [text.partition(" ")[0] for text in found] == ["api", "control", "pool-bbbb22", "pool-bbbb22"]
    assert printed(data_dir, "--since", "1s") == ""
    assert len(printed(data_dir, "--since", "2026-11-22T16:20:03Z", "-n", "1").splitlines()) == 1


@pytest.mark.parametrize("given", ["yesterday", "-5m", "2026-13-40", "9" * 400 + "d", ""])
def test_an_unknown_instant_is_refused(data_dir: Path, given: str) -> None:
    with pytest.raises(InvalidInput, match="--since"):
        printed(data_dir, f"--since={given}")


def test_the_older_part_of_a_rotated_log_comes_first(data_dir: Path) -> None:
    file = data_dir / "logs" / "api.log"
    log_files.rotated(file).write_text(f"{line('api_zero', 0)}\n")

    assert [json.loads(text)["event"] for text in printed(data_dir, "api").splitlines()] == [
        "api_zero",
        "api_one",
        "api_three",
    ]
    assert "api_zero" not in printed(data_dir, "api", "-n", "2")
    assert "api_zero" in printed(data_dir, "api", "--since", "2026-11-22T16:20:00Z")


@pytest.mark.parametrize("rename", [True, False])
def test_a_followed_log_loses_no_line_when_it_is_rotated(
    tmp_path: Path, rename: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log is renamed at the start of its process, and emptied while it runs."""
    monkeypatch.setattr(log_files, "LOG_BYTES", 1)
    file = tmp_path / "api.log"
    file.write_text("old\n")
    followed, _ = logs._read("api", file, 10, None)

    with file.open("a") as stream:
        stream.write("last\npart")
    assert [one.text for one in followed.appended()] == ["last"]
    with file.open("a") as stream:
        stream.write(" whole\nbefore\n")
    (log_files.rename_when_long if rename else log_files.copy_when_long)(file)
    with file.open("a") as stream:
        stream.write("after\n")
    assert [one.text for one in followed.appended()] == ["part whole", "before", "after"]
    file.unlink()
    assert followed.appended() == []


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ('{"event": "x", "timestamp": "2026-11-22T16:20:45.123Z"}', AT),
        ("2026-11-22 16:20:45.123 UTC [12] LOG:  listening", AT),
        ("2026-11-22T16:20:45.123Z • servers", AT),
        ("7:M 22 Nov 2026 16:20:45.123 * Ready", AT.replace(tzinfo=None).astimezone(UTC)),
        ('{"event": "x", "timestamp": "2026-99-22T16:20:45.123Z"}', None),
        ("no time", None),
        ("", None),
    ],
)
def test_the_time_of_a_line(text: str, at: datetime | None) -> None:
    assert log_lines.time_of(text) == at


def test_a_line_is_written_for_people_at_a_terminal() -> None:
    """With its fields, and without what a hostile log would do to the terminal."""
    hostile = line("step_failed", 1, step_id="s\x1b[31m1", count=2, exception=[{"exc_type": "E", "exc_value": "why"}])

    shown = log_lines.rendered(LogLine(AT, "control", hostile)).plain
    assert shown.endswith("info    step_failed step_id=s1 count=2\n  E: why")
    assert log_lines.rendered(LogLine(AT, "up", "2026-11-22T16:20:45.123Z • api")).plain.endswith(":45.123 • api")
    assert not {"\x1b", "\x07"} & set(log_lines.rendered(LogLine(AT, "postgres", "\x1b]0;title\x07text")).plain)
