"""The process tree of `arriero up`: its stop."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from app.cli.processes.member import ProcessMember
from app.cli.processes.records import TreeRecord
from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Interrupted, Signals
from app.cli.processes.tree import Tree
from app.kernel.settings import Settings


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
