"""Forks as children: what they have of their parent, and how they end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.kernel.processes.forks import run_script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def test_a_fork_has_nothing_of_its_parent_but_the_modules(tmp_path: Path) -> None:
    """It has its own session, environment, log, title and signal handlers, and only the descriptors it was given."""
    found = run_script(
        tmp_path,
        """
import atexit, fcntl, socket
signal.signal(signal.SIGTERM, lambda *_: None)
atexit.register(lambda: (folder / "exit").open("a").write("x"))
os.environ["OF_PARENT"] = "yes"
locked = open(folder / "lock", "w")
fcntl.flock(locked, fcntl.LOCK_EX)
given, other = socket.socket(), socket.socket()
read, write = os.pipe()

def entry():
    said = {
        "session": os.getsid(0) == os.getpid(),
        "environment": dict(os.environ),
        "input": sys.stdin.read(),
        "terminates": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "title": Path("/proc/self/cmdline").read_text().rstrip("\\0"),
        "own": os.getpid(),
    }
    names = {n: os.readlink(f"/proc/self/fd/{n}") for n in (given.fileno(), other.fileno(), locked.fileno(), write)}
    said["given"] = names[given.fileno()].startswith("socket:")
    said["others"] = sorted({names[n] for n in (other.fileno(), locked.fileno(), write)})
    print(json.dumps(said), flush=True)
    print("to the log", file=sys.stderr)

one = child(entry, environment={**ENVIRONMENT, "GIVEN": "1"}, descriptors=[given.fileno()])
one.start()
record = pid_file.find(folder / "child.pid")
until(lambda: not one.alive)
lines = one.log_tail().splitlines()
said = json.loads(lines[0])
print(json.dumps({**said, "pid": one.pid, "recorded": record.pid, "code": one.returncode, "rest": lines[1:]}))
""",
    )
    assert found.pop("own") == found.pop("recorded") == found.pop("pid")
    assert "executed" in found.pop("title"), "the command line that it stands for"
    assert found == {
        "session": True,
        "environment": {"PATH": "/usr/bin:/bin", "GIVEN": "1"},
        "input": "",
        "terminates": True,
        "given": True,
        "others": ["/dev/null"],
        "code": 0,
        "rest": ["to the log"],
    }
    assert (tmp_path / "exit").read_text() == "x", "only the parent calls its exit handlers"


def test_a_fork_ends_with_the_code_of_its_program(tmp_path: Path) -> None:
    """Threads that it has started end before it, and exit handlers that it has registered are called."""
    found = run_script(
        tmp_path,
        """
import atexit

def works():
    atexit.register(lambda: print("bye", flush=True))
    threading.Thread(target=lambda: (time.sleep(0.2), print("worked", flush=True))).start()

def fails():
    raise ValueError("a defect")

def ends():
    sys.exit(3)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

entries = {"works": works, "fails": fails, "ends": ends, "returns": lambda: 7, "killed": killed}
children = {name: child(entry, name) for name, entry in entries.items()}
for one in children.values():
    one.start()
until(lambda: not any(one.alive for one in children.values()))
codes = {name: one.returncode for name, one in children.items()}
logs = {name: children[name].log_tail().splitlines() for name in ("works", "fails")}
for one in children.values():
    one.stop()
print(json.dumps({"codes": codes, "logs": logs, "left": [file.name for file in folder.glob("*.pid")]}))
""",
    )
    assert found["codes"] == {"works": 0, "fails": 1, "ends": 3, "returns": 7, "killed": -9}
    assert found["logs"]["works"] == ["worked", "bye"]
    assert found["logs"]["fails"][-1] == "ValueError: a defect"
    assert found["left"] == []


def test_a_fork_is_stopped_as_every_child(tmp_path: Path) -> None:
    """It gets its stop signal, and is killed with all of its session when it does not end."""
    found = run_script(
        tmp_path,
        """
import subprocess

def obstinate():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(subprocess.Popen(["sleep", "100"]).pid, flush=True)
    time.sleep(100)

willing, other = child(lambda: time.sleep(100), "willing"), child(obstinate, "obstinate")
for one in (willing, other):
    one.start()
until(other.log_tail)
grandchild = int(other.log_tail())
codes = [willing.stop(), other.stop(timedelta(seconds=0.2))]
print(json.dumps({"codes": codes, "gone": pid_file.birth(grandchild) is None}))
""",
    )
    assert found == {"codes": [-15, -9], "gone": True}


def test_a_fork_never_begins_without_a_pid_file(tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        """
(folder / "child.pid").mkdir()
one = child(lambda: (folder / "ran").touch())
try:
    one.start()
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "ran": (folder / "ran").exists(), "alive": one.alive}))
""",
    )
    assert found == {"error": "ServerNotStarted", "ran": False, "alive": False}


def test_a_process_with_threads_executes_the_program_instead(tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        """
stop = threading.Event()
threading.Thread(target=stop.wait).start()
one = child(lambda: print("forked"))
one.start()
until(lambda: not one.alive)
stop.set()
print(json.dumps(one.log_tail()))
""",
    )
    assert found == "executed"
