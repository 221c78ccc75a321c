"""The process tree of `arriero up`: its stop."""

from __future__ import annotations

from pathlib import Path

from app.cli.processes.records import TreeRecord
from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Signals
from app.cli.processes.tree import Tree
from app.kernel.settings import Settings


def test_a_stop_removes_the_addresses_of_metrics(tmp_path: Path) -> None:
    """A fast stop kills the pools, and the agent that would have removed their files."""
    stale = tmp_path / "metrics" / "pool.m-1.abcdef.json"
    stale.parent.mkdir()
    stale.write_text("[]")
    Tree(Settings(), tmp_path, Reporter(), [], TreeRecord(1, "", "")).stop(Signals())
    assert not stale.exists()
