"""The process tree of `arriero up`: its start with files that cannot be served, and its stop."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest

from app.cli.processes.member import ProcessMember
from app.cli.processes.records import TreeRecord
from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Interrupted, Signals
from app.cli.processes.tree import Tree, running_tree
from app.kernel import clock
from app.kernel import settings as settings_module
from app.kernel.errors import ModelFileDamaged, ModelFileMissing, ModelFileUnusable
from app.kernel.processes.data_directory import LOCK_FILE, DataDirectory
from app.kernel.settings import Settings

ENTRY = '[[models]]\nname = "a:1"\nuse_cases = ["chat"]\nsource = {{ path = "{path}" }}\n'


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, ModelFileMissing, r"a:1: there is no file .*a\.gguf; put it there, or correct `path`"),
        (b"GGUF\x03", ModelFileDamaged, r"a\.gguf is not a usable GGUF file: .*; replace the file, or correct `path`"),
    ],
)
def test_nothing_starts_when_a_kept_model_cannot_be_served(
    tmp_path: Path, content: bytes | None, kind: type[ModelFileUnusable], message: str
) -> None:
    (tmp_path / "catalog.toml").write_text(ENTRY.format(path=tmp_path / "a.gguf"))
    if content is not None:
        (tmp_path / "a.gguf").write_bytes(content)
    given = {"ARRIERO_CATALOG__FILES": str(tmp_path / "catalog.toml"), "ARRIERO_POOLS__MODELS": "a:1"}
    loaded = settings_module.load(environment=given | {"ARRIERO_DATA_DIR": str(tmp_path / "data")}).settings
    with (
        DataDirectory(loaded.data_dir, now=clock.now(), command="arriero up") as held,
        pytest.raises(kind, match=message),
        running_tree(loaded, held, Signals(), Reporter(), flower=False),
    ):
        pass
    assert [file.name for file in (tmp_path / "data").iterdir()] == [LOCK_FILE]


def test_a_stop_removes_the_addresses_of_metrics(tmp_path: Path) -> None:
    """A fast stop kills the pools, and the agent that would have removed their files."""
    stale = tmp_path / "metrics" / "pool.m-1.abcdef.json"
    stale.parent.mkdir()
    stale.write_text("[]")
    Tree(Settings(), tmp_path, Reporter(), [], TreeRecord(1, "", "")).stop(Signals())
    assert not stale.exists()


def test_an_interrupt_that_got_lost_ends_the_watch(tmp_path: Path) -> None:
    """A destructor may run while the signal comes, and exceptions in destructors are dropped."""
    signals = Signals()
    signals.received = True
    with pytest.raises(Interrupted):
        Tree(Settings(), tmp_path, Reporter(), [], TreeRecord(1, "", "")).watch(signals)


def test_a_requested_restart_is_no_failure(tmp_path: Path) -> None:
    """It starts again at once, however often; a program that does not end is killed after its grace."""
    member = ProcessMember("program", ["http.server", "--bind", "127.0.0.1", "0"], timedelta(seconds=30))
    settings = Settings(data_dir=tmp_path)
    for count in (1, 2, 3):
        member.start(settings, tmp_path)
        assert member.child is not None
        member.request_restart(100.0)
        assert not member.is_late(130.0)
        assert member.is_late(130.1)
        assert member.child.wait(timedelta(seconds=60)) is not None
        assert member.schedule_restart(100.0) == "program is restarted, as requested"
        assert (member.restarts, member.restart_at) == (count, 100.0)


def test_a_program_that_cannot_start_does_not_end_the_tree(tmp_path: Path) -> None:
    """Its log cannot be written, as on a full disk: it is tried again, later each time, and starts when it can."""
    log = tmp_path / "logs" / "program.log"
    log.mkdir(parents=True)
    (tmp_path / "logs" / "requeue.log").mkdir()
    member = ProcessMember("program", ["http.server", "--bind", "127.0.0.1", "0"], timedelta(seconds=30))
    tree = Tree(Settings(data_dir=tmp_path), tmp_path, Reporter(), [], TreeRecord(1, "", ""))
    tree.members.append(member)
    delays = []
    for _ in range(4):
        member.restart_at = before = time.monotonic()
        tree.check()
        assert member.child is None
        delays.append(round(member.restart_at - before))
    assert delays == [0, 1, 2, 4]
    tree.requeue("a-dead-worker")
    log.rmdir()
    member.restart_at = 0.0
    tree.check()
    assert member.child is not None
    assert member.child.alive
    member.child.stop()
