"""The built-in rules, which every installation begins with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

from app.governance.rules import check
from app.governance.rules.rule import Rule


@lru_cache(maxsize=1)
def builtin_rules() -> Mapping[str, Rule]:
    """Return the built-in rules by name."""
    text = resources.files("app.governance.rules").joinpath("builtin.yaml").read_text("utf-8")
    return {rule.rule: rule for rule in map(check.check, check.parse(text))}
