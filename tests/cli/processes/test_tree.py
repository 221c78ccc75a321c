"""The process tree of `arriero up`: what it leaves behind."""

from __future__ import annotations

from pathlib import Path

from app.cli.processes.tree import Signals, Tree
from app.kernel.settings import Settings


def test_a_stop_leaves_no_address_of_metrics(tmp_path: Path) -> None:
    """A hurried one kills the pools, and the agent that would have removed their files."""
    stale = tmp_path / "metrics" / "pool.m-1.abcdef.json"
    stale.parent.mkdir()
    stale.write_text("[]")
    Tree(Settings(), tmp_path, lambda *_: None, []).stop(Signals())
    assert not stale.exists()
