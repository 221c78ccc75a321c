"""docs/governance.md lists the signals as they are."""

from __future__ import annotations

from pathlib import Path

from app.governance.signals.names import SIGNALS


def test_the_list_of_signals_is_that_of_the_code() -> None:
    page = Path("docs/governance.md").read_text()
    lines = [
        f"| `{one.name}` | {one.unit} | {', '.join(one.labels)}{' ' if one.labels else ''}| {one.description} |"
        for one in SIGNALS.values()
    ]
    start = page.index("| `memory_utilisation`")
    assert page[start : page.index("\n\n", start)].splitlines() == lines
