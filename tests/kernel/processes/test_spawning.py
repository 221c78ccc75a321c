"""Spawning: a parent starts programs for another process, as forks, and tells it how they end."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from app.kernel.processes.process import Child
from app.kernel.processes.spawning import Spawner, SpawnerClient
from tests.kernel.processes.forks import run_script
from tests.kernel.processes.test_process import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

#: A parent that serves requests of a forked child, whose body follows; programs are functions by name.
_PARENT = """
from functools import partial
from app.kernel.processes.spawning import Spawner, SpawnerClient

PROGRAMS = {"ends": lambda: 7, "sleeps": lambda: time.sleep(100)}

def described(request):
    return Child(
        request.name, [sys.executable, *request.arguments], environment=request.environment,
        log_file=Path(request.log_file), pid_file=Path(request.pid_file), parent=request.parent,
        entry=PROGRAMS[request.arguments[0]],
    )

spawner = Spawner(described)

def asks():
    client = SpawnerClient(spawner.inherited.fileno(), lambda: None)
    start = lambda name: client.start(name, [name], ENVIRONMENT, folder / f"{name}.log", folder / f"{name}.pid")
    print(json.dumps(body(start)), flush=True)

def served():
    one = child(asks, "asks", descriptors=[spawner.inherited.fileno()])
    one.start()
    while one.alive:
        spawner.serve()
        time.sleep(0.01)
    return one.log_tail().splitlines()[-1]
"""


def test_what_the_parent_starts_belongs_to_the_process_that_asks(tmp_path: Path) -> None:
    """It is a fork of the parent; its pid file names the process that asked, which stops it and gets its exit code."""
    found = run_script(
        tmp_path,
        _PARENT
        + """
def body(start):
    ended, stopped = start("ends"), start("sleeps")
    until(lambda: not ended.alive)
    record = pid_file.find(folder / "sleeps.pid")
    kin = Path(f"/proc/{stopped.pid}/stat").read_text().rpartition(")")[2].split()[1]
    said = {"code": ended.returncode, "of_parent": int(kin) == os.getppid(), "recorded": record.parent == os.getpid()}
    stopped.stop()
    return {**said, "alive": stopped.alive, "signal": stopped.returncode, "left": (folder / "sleeps.pid").exists()}

print(served())
""",
    )
    assert found == {
        "code": 7,
        "of_parent": True,
        "recorded": True,
        "alive": False,
        "signal": -15,
        "left": False,
    }


def test_a_program_that_ends_at_once_is_still_known(tmp_path: Path) -> None:
    """The parent does not reap it before the process that asked has read its pid file."""
    found = run_script(
        tmp_path,
        _PARENT
        + """
from app.kernel.processes import spawning
known = SpawnerClient._known

def late(client, pid, *files):
    until(lambda: pid_file.birth(pid) is None)
    time.sleep(0.2)  # the parent serves about twenty times
    return known(client, pid, *files)

SpawnerClient._known = late

def body(start):
    ended = start("ends")
    return {"alive": ended.alive, "code": ended.returncode}

print(served())
""",
    )
    assert found == {"alive": False, "code": 7}


def test_a_parent_that_does_not_answer_in_time_starts_nothing_later(tmp_path: Path) -> None:
    """A request that was given up is void, so that the process can start the program itself."""
    found = run_script(
        tmp_path,
        _PARENT
        + """
from app.kernel.processes import spawning
spawning._ANSWER_SECONDS = 0.2

def body(start):
    return [start("sleeps"), start("sleeps")]

one = child(asks, "asks", descriptors=[spawner.inherited.fileno()])
one.start()
until(lambda: not one.alive)
spawner.serve()
print(json.dumps({"asked": json.loads(one.log_tail()), "started": spawner.pids}))
""",
    )
    assert found == {"asked": [None, None], "started": []}


def test_a_request_of_a_dead_process_is_void(tmp_path: Path) -> None:
    found = run_script(
        tmp_path,
        _PARENT
        + """
def body(start):
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    return start("sleeps") is None

one = child(asks, "asks", descriptors=[spawner.inherited.fileno()])
one.start()
until(lambda: not one.alive)
spawner.serve()
print(json.dumps(spawner.pids))
""",
    )
    assert found == []


def test_a_parent_that_cannot_fork_says_so_at_once(tmp_path: Path) -> None:
    """The process of the tests has threads."""

    def never(_: object) -> Child:
        raise AssertionError("nothing is started")

    spawner = Spawner(never)
    client = SpawnerClient(spawner.inherited.detach(), lambda: None)
    answers: list[object] = []
    asking = threading.Thread(
        target=lambda: answers.append(client.start("x", ["x"], {}, tmp_path / "x.log", tmp_path / "x.pid"))
    )
    asking.start()
    wait_until(spawner.has_request)
    spawner.serve()
    asking.join()
    assert answers == [None]
    spawner.close()
    client.close()
