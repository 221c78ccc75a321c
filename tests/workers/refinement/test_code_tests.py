"""Untrusted code is tested, and can do nothing else."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from workers.refinement import code_tests
from workers.refinement.code_tests import CodeTestsRefused, run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="code is confined on Linux only")


@pytest.fixture(scope="module", autouse=True)
def _confined() -> None:
    try:
        code_tests.require_possible("confined")
    except CodeTestsRefused as error:
        pytest.skip(str(error))


def error_of(code: str, seconds: float = 10.0) -> str | None:
    return run_tests("", [code], seconds, 128, "confined").errors[0]


def test_each_test_is_judged() -> None:
    tests = ["assert add(2, 2) == 4", "assert add(2, 2) == 5, 'wrong sum'", "raise SystemExit(0)"]
    found = run_tests(
        "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    1 / 0", tests, 5, 128, "confined"
    )

    assert found.errors == [None, "AssertionError: wrong sum", "SystemExit: 0"]
    broken = run_tests("def add(", tests, 5, 128, "confined")
    assert broken.broken is not None
    assert all(error is not None for error in broken.errors)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import socket; socket.socket()", "PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['/bin/true'])", "PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", "PermissionError"),
        ("import fcntl, os; fcntl.fcntl(os.pipe()[0], 10, 9)", "PermissionError"),
        ("import fcntl, os; fcntl.ioctl(os.pipe()[0], 0x8901, bytes(4))", "PermissionError"),
        ("import os; os.sched_setaffinity(os.getppid(), [0])", "PermissionError"),
        ("import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))", "PermissionError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("import os; os.listdir('/proc')", "PermissionError"),
        ("import os; os.mkdir('folder')", "PermissionError"),
        ("import os; os.chmod('.', 0o777)", "PermissionError"),
        ("open('big', 'wb').write(bytes(5_000_000))", "File too large"),
        ("bytearray(10**9)", "MemoryError"),
        ("import os; assert not os.environ, 'there is an environment'\nraise OSError('empty')", "empty"),
    ],
)
def test_code_cannot_reach_anything(code: str, said: str) -> None:
    assert said in (error_of(code) or "it was possible")


def test_files_outside_of_its_directory_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)

    assert "PermissionError" in (error_of(f"open({str(tmp_path / 'mine')!r}, 'w')") or "")
    assert error_of("open('own', 'w').write('x'); assert open('own').read() == 'x'") is None
    assert not (tmp_path / "mine").exists()


def test_pure_computation_and_threads_work() -> None:
    assert error_of("import json, math, re, decimal, datetime, sqlite3") is None
    assert error_of("import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3") is None
    assert error_of("import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()") is None


def test_what_does_not_end_is_ended() -> None:
    found = run_tests("", ["while True: pass", "assert True"], 0.5, 128, "confined")

    assert found.errors[0] == "it was ended after 0.5 s"
    assert "was not run" in (found.errors[1] or "")
    assert "it ended before its tests did" in (error_of("import os; os._exit(0)") or "")
    assert "files or" in (error_of("i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w')") or "")


def test_a_false_report_without_the_prefix_does_not_count() -> None:
    lines = r'{"test": 0}\n{"end": true}\n'
    forged = f"import os\nfor n in range(3, 32):\n    try: os.write(n, b'{lines}')\n    except OSError: pass\n"
    found = run_tests(forged, ["assert False"], 5, 128, "confined")

    assert found.errors == ["AssertionError: "]


def test_a_report_that_is_nested_too_deeply_does_not_count() -> None:
    deep = """
import os, sys
frame = sys._getframe()
while "report" not in frame.f_locals:
    frame = frame.f_back
own = frame.f_locals
os.write(own["report"], (own["prefix"] + "[" * 60_000 + "\\n").encode())
os._exit(0)
"""
    assert error_of(deep) == "it ended before its tests did"


def test_what_an_unprotected_code_starts_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "unconfined.py"
    source = code_tests._PROGRAM.read_text()
    confined = "        _landlock(libc, directory)\n        _filter(libc)\n"
    assert confined in source
    program.write_text(source.replace(confined, "        pass\n"))
    monkeypatch.setattr(code_tests, "_PROGRAM", program)
    fork = "import os, time\npid = os.fork()\nif not pid:\n    time.sleep(600)\nraise OSError(pid)"

    found = run_tests("", [fork], 3, 128, "unprotected").errors[0]

    assert found is not None
    with contextlib.suppress(ProcessLookupError):
        child = os.pidfd_open(int(found.rpartition(" ")[2]))
        assert select.select([child], [], [], 60)[0], "it runs on"
        os.close(child)


def test_it_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CodeTestsRefused, match=r"verification\.code_tests is off"):
        code_tests.require_possible("off")
    # A kernel without Landlock: the program finds another version of it.
    text = Path(code_tests._PROGRAM).read_text().replace("if version < 3:", "if version < 99:")
    program = tmp_path / "confinement.py"
    program.write_text(text)
    monkeypatch.setattr(code_tests, "_PROGRAM", program)
    if os.geteuid() == 0:
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == 0 and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o111)
    with pytest.raises(CodeTestsRefused, match="no Landlock"):
        code_tests.require_possible("confined")
    assert run_tests("", ["assert True"], 5, 128, "unprotected").errors == [None], "where the operator allows it"


def test_a_cancelled_step_ends_it() -> None:
    with pytest.raises(CancelledError):
        run_tests("", ["while True: pass"], 30, 128, "confined", on_stop=lambda stop: stop())
