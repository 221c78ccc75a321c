"""Disks that hang, folders that others touch, and pools that are killed while they write."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.conftest import MakeEngine
from tests.workers.engine.kv_store.test_restoring import STORIES, on_disk, one_kept, written
from workers.engine.kv_store import state_file
from workers.engine.kv_store.opening import identity
from workers.engine.kv_store.state_file import Acceptance

ROOT = Path(__file__).parents[4]

#: Holds a lease on a file: whoever opens it for writing is blocked by the system until the lease ends.
_LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
print("held", flush=True)
sys.stdin.read()
"""

#: Writes the states of other prompts without an end. None stays in memory.
_WRITER = """
import sys
from pathlib import Path
from app.inference.requests import GenerateRequest, Sampling
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions
folder, model = map(Path, sys.argv[1:3])
options = EngineOptions(slots=1, kept=0, context=1024, vectors=False, threads=1, store_folder=folder,
    store_disk_bytes=2**28, store_bytes=1000)
engine = LlamaEngine(model, options)
for number in range(10**6):
    prompt = f"{number} llamas " + "walked over the mountains " * 10
    engine.generate(GenerateRequest(prompt=prompt, max_tokens=1, sampling=Sampling(temperature=0))).result()
"""


@contextlib.contextmanager
def leased(file: Path) -> Iterator[None]:
    """Inside the block each opening of the file for writing hangs, in any process."""
    with subprocess.Popen(
        [sys.executable, "-c", _LEASE, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        if holder.stdout.readline() != b"held\n":
            pytest.skip("the file system of this folder has no leases")
        try:
            yield
        finally:
            holder.stdin.close()


def test_a_disk_that_hangs_holds_up_neither_requests_nor_the_end(
    make: MakeEngine, tmp_path: Path, tiny_llama: Path
) -> None:
    """The thread that writes is inside a call of the system that does not return, until after the end."""
    engine = one_kept(make, tiny_llama, **on_disk(tmp_path, store_bytes=40_000))
    texts = [written(engine, story)[0] for story in STORIES]
    store = engine._loop._idle.store
    assert store is not None
    with leased(tmp_path / "kv" / ".lock"):
        for _ in range(3):
            assert [written(engine, story)[0] for story in STORIES] == texts
        engine.close()
        hanging = store._writer._thread
        assert hanging is not None
        assert hanging.is_alive(), "the end did not wait for the disk"
    hanging.join(60)
    assert not hanging.is_alive()


def test_a_lock_that_another_process_keeps_does_not_keep_an_engine_from_its_start(
    make: MakeEngine, tmp_path: Path, tiny_llama: Path
) -> None:
    """As a pool does that is stopped, or hangs, while it changes the folder."""
    (tmp_path / "kv").mkdir(mode=0o700)
    with (tmp_path / "kv" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        engine = one_kept(make, tiny_llama, **on_disk(tmp_path))
        written(engine, STORIES[0])
        written(engine, STORIES[1])
        assert written(engine, STORIES[0])[1] > 60, "from memory"
        engine.close()
    assert [file.name for file in (tmp_path / "kv").iterdir()] == [".lock"]


def test_a_killed_engine_leaves_whole_files_only(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    """It is killed with a file half written, which the next one removes; all others can be used."""
    folder = tmp_path / "kv"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WRITER, str(folder), str(tiny_llama)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as pool:
        unfinished: list[Path] = []
        while not unfinished:
            assert pool.poll() is None
            with contextlib.suppress(FileNotFoundError), (folder / ".lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # meanwhile no file is begun or finished
                if list(folder.glob("*.kv")) and (unfinished := list(folder.glob("*.kv.tmp"))):
                    pool.kill()
                    pool.wait()
    assert all(file.exists() for file in unfinished)
    files = set(folder.glob("*.kv"))
    engine = one_kept(make, tiny_llama, **on_disk(tmp_path))
    figures = engine.metrics().store
    assert (figures.entries, figures.refused) == (len(files), 0)
    assert set(folder.glob("*.kv*")) == files, "the unfinished ones are gone"
    acceptance = Acceptance(identity(tiny_llama, engine.options), 1024, 2**30)
    for file in files:
        header = state_file.read_header(file, acceptance)
        assert len(state_file.read(file, acceptance, header, lambda: None)) == header.state_bytes
