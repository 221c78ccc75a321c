"""`arriero dead-letters`."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from app.kernel.broker import CeleryPublisher
from app.kernel.dead_letters import Reason
from tests.cli.conftest import Arriero


def test_dead_letters_are_listed_without_control_characters_and_removed(
    arriero: Arriero, publisher: CeleryPublisher
) -> None:
    assert "there are no dead letters" in arriero("dead-letters", "list").output
    letters = publisher.dead_letters()
    for hostile in ("\x1b[2J\x1b]0;title\x07", "[bold red]markup[/]"):
        letters.put(datetime(2026, 1, 1, tzinfo=UTC), "io", Reason.UNREADABLE, hostile, hostile.encode())

    output = arriero("dead-letters", "list").output
    assert "\x1b" not in output
    assert "\x07" not in output
    assert "\\x1b[2J" in output
    assert "[bold red]markup[/]" in output
    assert json.loads(arriero("dead-letters", "list", "--json").output)["counts"] == {"io": {"unreadable": 2}}
    assert "removed 2 dead letters" in arriero("dead-letters", "clear").output
