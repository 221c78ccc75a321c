"""Rules come from files, too."""

from __future__ import annotations

import os
from pathlib import Path

from structlog.testing import capture_logs

from app.governance.rules import service
from app.governance.rules.service import RuleService
from app.kernel.database import Database
from workers.governance.evaluation import apply_files

RULE = """
  - rule: {name}
    category: quality
    description: {text}
    all: [{{signal: error_rate, operator: ">", threshold: 0.2}}]
"""


def write(path: Path, *rules: str, text: str = "one", at: int = 1) -> None:
    path.write_text("rules:" + "".join(RULE.format(name=name, text=text) for name in rules))
    os.utime(path, (at, at))


def sources(rules: RuleService) -> dict[str, tuple[str, int]]:
    return {one.stored.name: (one.stored.source, one.stored.version) for one in rules.all("")}


def test_the_stored_rules_are_those_of_the_files(database: Database, tmp_path: Path) -> None:
    rules, path, builtin = RuleService(database, 100), tmp_path / "rules.yaml", "memory-high"
    service.ensure_builtin(database)
    before = sources(rules)
    write(path, "a", "b", builtin)
    for _ in range(2):
        apply_files(rules, [path])
    assert sources(rules) == before | {"a": ("file", 1), "b": ("file", 1), builtin: ("file", 2)}
    rules.enable("a", enabled=False)
    write(path, "a", text="two", at=2)
    apply_files(rules, [path])
    assert sources(rules) == before | {"a": ("file", 2), builtin: ("builtin", 3)}
    assert not rules.get("a").stored.enabled
    path.write_text("rules: [{rule: a}]")
    os.utime(path, (3, 3))
    with capture_logs() as logged:
        for _ in range(3):
            apply_files(rules, [path, tmp_path / "missing.yaml"])
    assert [line["event"] for line in logged] == ["rule_file_invalid"], "once, as long as it is the same"
    assert sources(rules)["a"] == ("file", 2), "an invalid file changes nothing"
    apply_files(rules, [])
    assert sources(rules).keys() == before.keys()
