"""Child processes, tested with real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import log_files, pid_file, process
from app.kernel.processes.pid_file import birth
from app.kernel.processes.process import Child, end_leftovers

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
SOON = timedelta(seconds=10)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition; fail when it does not become true."""
    limit = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < limit, "the condition did not become true"
        pause.wait(0.01)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Create children from shell scripts, and stop them at the end."""
    made: list[Child] = []

    def make_child(script: str, **more: object) -> Child:
        settings: dict[str, object] = {
            "environment": ENVIRONMENT,
            "log_file": tmp_path / "child.log",
            "pid_file": tmp_path / "child.pid",
            **more,
        }
        child = Child("child", ["/bin/sh", "-c", script], **settings)  # type: ignore[arg-type] # fields of several types
        made.append(child)
        return child

    yield make_child
    for child in made:
        child.stop(timedelta(0))


def test_child_runs_in_its_own_session_with_only_the_given_environment(
    make: Callable[..., Child], tmp_path: Path
) -> None:
    child = make("env; echo input: $(cat); exec sleep 60", environment={**ENVIRONMENT, "GIVEN": "yes"})
    child.start()
    wait_until(lambda: "input:" in child.log_tail())

    assert child.alive
    assert child.returncode is None
    assert child.pid is not None
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    names = {line.partition("=")[0] for line in child.log_tail(50).splitlines()}
    assert names <= {"PATH", "GIVEN", "PWD", "OLDPWD", "SHLVL", "_", "input: "} | {"input:"}
    assert "GIVEN=yes" in child.log_tail()
    assert stat.S_IMODE((tmp_path / "child.log").stat().st_mode) == 0o600


def test_pid_file_has_pid_birth_and_command_and_is_removed_with_the_child(
    make: Callable[..., Child], tmp_path: Path
) -> None:
    child = make("exec sleep 60")
    child.start()
    file = tmp_path / "child.pid"
    record = json.loads(file.read_text())

    assert record["pid"] == child.pid
    assert record["birth"] == birth(record["pid"])
    assert "sleep 60" in record["command"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    assert child.stop(SOON) == -signal.SIGTERM
    assert not file.exists()
    assert not child.alive
    assert child.stop(SOON) == -signal.SIGTERM, "stopping again changes nothing"


def test_nothing_runs_when_the_pid_file_cannot_be_written(make: Callable[..., Child], tmp_path: Path) -> None:
    """The program starts only after its pid file is written: a killed parent never leaves an unknown child."""
    (tmp_path / "child.pid").mkdir()  # a file cannot replace a directory
    child = make(f"touch {tmp_path}/ran; sleep 60")

    with pytest.raises(ServerNotStarted, match="child did not start"):
        child.start()

    assert not child.alive
    assert not (tmp_path / "ran").exists()


def test_interrupt_while_the_pid_file_is_written_leaves_no_process(
    make: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, record: pid_file.PidRecord) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pid_file, "write", interrupted)
    child = make(f"touch {tmp_path}/ran; sleep 60")
    with pytest.raises(KeyboardInterrupt):
        child.start()

    assert not child.alive
    assert not (tmp_path / "ran").exists()


def test_missing_program_is_in_the_error(tmp_path: Path) -> None:
    child = Child(
        "engine",
        ["/nowhere/engine"],
        environment=ENVIRONMENT,
        log_file=tmp_path / "engine.log",
        pid_file=tmp_path / "engine.pid",
    )
    with pytest.raises(ServerNotStarted, match="there is no program /nowhere/engine"):
        child.start()
    assert child.pid is None
    assert child.stop() is None


def test_child_starts_only_once(make: Callable[..., Child]) -> None:
    child = make("exec sleep 60")
    child.start()
    with pytest.raises(ServerNotStarted, match="started before"):
        child.start()
    assert child.alive


def test_returncode_and_log_of_a_child_that_ended_by_itself(make: Callable[..., Child]) -> None:
    child = make("echo bad luck >&2; exit 3")
    child.start()
    assert child.wait(SOON) == 3
    assert child.returncode == 3
    assert child.log_tail() == "bad luck"


def test_log_tail_is_of_this_start_only(make: Callable[..., Child]) -> None:
    for word in ("one", "two"):
        child = make(f"for i in 1 2 3; do echo {word} $i; done")
        child.start()
        child.wait(SOON)
        child.stop()
    assert child.log_tail() == "two 1\ntwo 2\ntwo 3"
    assert child.log_tail(1) == "two 3"
    assert "one 1" in child.log_file.read_text()


def test_large_log_is_rotated_at_the_next_start(
    make: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "LOG_BYTES", 10)
    (tmp_path / "child.log").write_text("an old line\n")
    child = make("echo new")
    child.start()
    child.wait(SOON)
    assert (tmp_path / "child.log").read_text() == "new\n"
    assert (tmp_path / "child.log.1").read_text() == "an old line\n"


def test_long_log_is_rotated_while_its_process_writes(
    make: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process goes on at the beginning of the emptied file, and nothing of it is lost."""
    monkeypatch.setattr(log_files, "LOG_BYTES", 10)
    log = tmp_path / "child.log"
    child = make(f"echo an old line; until [ -e {tmp_path}/go ]; do sleep 0.02; done; echo new")
    child.start()
    wait_until(lambda: log.read_text() == "an old line\n")
    child.rotate_log()
    (tmp_path / "go").touch()
    child.wait(SOON)
    assert log.read_bytes() == b"new\n"
    assert (tmp_path / "child.log.1").read_text() == "an old line\n"
    assert child.log_tail() == "new"
    child.rotate_log()
    assert log.read_bytes() == b"new\n", "a short log stays"
    assert stat.S_IMODE((tmp_path / "child.log.1").stat().st_mode) == 0o600


def test_child_that_ignores_its_stop_signal_is_killed_with_its_descendants(
    make: Callable[..., Child], tmp_path: Path
) -> None:
    script = (
        "trap '' TERM INT;"
        f" setsid sh -c \"trap '' TERM; echo \\$\\$ > {tmp_path}/far; while :; do sleep 1; done\" &"
        f" sh -c \"trap '' TERM; echo \\$\\$ > {tmp_path}/near; while :; do sleep 1; done\" &"
        " while :; do sleep 1; done"
    )
    child = make(script)
    child.start()
    wait_until(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in ("near", "far")))
    pids = [int((tmp_path / name).read_text()) for name in ("near", "far")]

    assert child.stop(timedelta(milliseconds=100)) == -signal.SIGKILL

    assert [birth(pid) for pid in pids] == [None, None]
    assert not (tmp_path / "child.pid").exists()


def test_child_that_ends_in_order_leaves_no_process_of_its_session(make: Callable[..., Child], tmp_path: Path) -> None:
    child = make(f"sleep 60 & echo $! > {tmp_path}/helper; trap 'exit 0' TERM; while :; do sleep 0.05; done")
    child.start()
    wait_until(lambda: (tmp_path / "helper").exists() and (tmp_path / "helper").read_text())
    helper = int((tmp_path / "helper").read_text())
    assert birth(helper) is not None

    assert child.stop(SOON) == 0
    assert birth(helper) is None


def test_stop_signal_is_the_childs_own(make: Callable[..., Child], tmp_path: Path) -> None:
    script = f"trap 'exit 7' INT; touch {tmp_path}/up; while :; do sleep 0.05; done"
    child = make(script, stop_signal=signal.SIGINT)
    child.start()
    wait_until((tmp_path / "up").exists)
    assert child.stop(SOON) == 7


def test_interrupt_while_stopping_kills_the_child_and_is_raised(
    make: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C ends the wait early, and still no process is left."""
    child = make(f"trap 'touch {tmp_path}/asked' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done")
    child.start()
    wait_until((tmp_path / "up").exists)

    def interrupt() -> None:
        wait_until((tmp_path / "asked").exists)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        child.stop(timedelta(seconds=60))
    killer.join()
    assert not child.alive
    assert child.returncode == -signal.SIGKILL


def test_zombie_is_not_alive(make: Callable[..., Child]) -> None:
    child = make("exec sleep 60")
    child.start()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    # Read the state from the kernel: `alive` would reap the process.
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert birth(child.pid) is None
    assert not child.alive


_PARENT = """
import sys, signal
from datetime import timedelta
from pathlib import Path
from app.kernel.processes.process import Child
directory = Path(sys.argv[1])
deaf = "trap '' TERM; setsid sleep 601 & echo $!; echo up; while :; do sleep 1; done"
for name, script in (("kind", "exec sleep 600"), ("deaf", deaf)):
    Child(name, ["/bin/sh", "-c", script], environment={"PATH": "/usr/bin:/bin"}, log_file=directory / f"{name}.log",
          pid_file=directory / f"{name}.pid").start()
print("started", flush=True)
signal.pause()
"""


def test_children_of_a_killed_parent_are_ended_at_the_next_start(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    try:
        with parent.stdout as out:
            assert out.readline() == b"started\n"
        wait_until(lambda: "up" in (tmp_path / "deaf.log").read_text())
        while_parent_lived = end_leftovers(tmp_path)
    finally:
        parent.kill()
        parent.wait()
    assert while_parent_lived == (), "children of a living parent are not leftovers"
    deaf, kind = (json.loads((tmp_path / f"{name}.pid").read_text())["pid"] for name in ("deaf", "kind"))
    far = int((tmp_path / "deaf.log").read_text().split()[0])
    assert all(birth(pid) is not None for pid in (deaf, kind, far))

    ended = end_leftovers(tmp_path, timedelta(milliseconds=300))

    assert [(leftover.name, leftover.pid, leftover.forced) for leftover in ended] == [
        ("deaf", deaf, True),
        ("kind", kind, False),
    ]
    assert [birth(pid) for pid in (deaf, kind, far)] == [None, None, None]
    assert not list(tmp_path.glob("*.pid"))
    assert end_leftovers(tmp_path) == ()


def test_another_process_with_a_recycled_pid_is_not_signalled(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "600"])
    try:
        record = pid_file.PidRecord(
            name="old",
            pid=other.pid,
            birth="another-boot/1",
            command="old",
            stop_signal=int(signal.SIGKILL),
            parent=2**22 + 1,
            parent_birth="another-boot/0",
        )
        pid_file.write(tmp_path / "old.pid", record)
        assert end_leftovers(tmp_path) == ()
        assert other.poll() is None
        assert not (tmp_path / "old.pid").exists()
    finally:
        other.kill()
        other.wait()


def test_pid_files_of_other_programs_are_not_changed(tmp_path: Path) -> None:
    (tmp_path / "nginx.pid").write_text("1\n")
    (tmp_path / "cut.pid").write_text('{"pid": ')
    assert end_leftovers(tmp_path) == ()
    assert len(list(tmp_path.glob("*.pid"))) == 2
    assert end_leftovers(tmp_path / "nowhere") == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can set another account")
def test_child_can_run_under_another_account(make: Callable[..., Child]) -> None:
    child = make("id -u; id -G", account=(65534, 65534))
    child.start()
    assert child.wait(SOON) == 0
    assert child.log_tail() == "65534\n65534"


#: A parent that starts a child with a pid file, prints its pid, and waits until it is killed.
PARENT = """
import sys, time
from pathlib import Path
from app.kernel.processes.process import Child
folder = Path(sys.argv[1])
child = Child("kid", ["sleep", "60"], environment={"PATH": "/usr/bin:/bin"}, log_file=folder / "kid.log",
              pid_file=folder / "kid.pid")
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_process_whose_parent_died_is_adopted_and_ended(tmp_path: Path) -> None:
    """While its parent lives, it cannot be adopted; afterwards another process adopts and ends it."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ}
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert process.adopt(tmp_path / "kid.pid", tmp_path / "kid.log") is None
        parent.kill()
    adopted = process.adopt(tmp_path / "kid.pid", tmp_path / "kid.log")

    assert adopted is not None
    assert (adopted.pid, adopted.alive, adopted.name) == (pid, True, "kid")
    assert end_leftovers(tmp_path / "none") == ()
    adopted.stop(timedelta(0))
    assert not adopted.alive
    assert birth(pid) is None
    assert not (tmp_path / "kid.pid").exists()


def test_the_pid_file_of_a_dead_process_is_removed(tmp_path: Path) -> None:
    record = pid_file.PidRecord("kid", 2**22 - 1, "never", "sleep", 15, 2**22 - 2, "never")
    pid_file.write(tmp_path / "kid.pid", record)

    assert process.adopt(tmp_path / "kid.pid", tmp_path / "kid.log") is None
    assert not (tmp_path / "kid.pid").exists()
