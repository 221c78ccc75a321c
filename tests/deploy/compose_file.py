"""deploy/compose.yaml, read as Compose reads it: anchors, variables with defaults, and services with their profiles."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from app.kernel.units import durations

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy/compose.yaml"
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class ComposeService:
    """A service of the file."""

    name: str
    document: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        return list(self.document.get("command", ()))

    @property
    def is_arriero(self) -> bool:
        return "arriero" in self.document["image"]

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.document.get("environment", {}).items()}

    @property
    def health(self) -> list[str] | None:
        """The words of the health check; None when it is disabled."""
        check = self.document.get("healthcheck", {})
        return None if check.get("disable") or not check else list(check["test"])

    @property
    def after(self) -> dict[str, str]:
        """Service to the condition that is waited for."""
        return {name: of["condition"] for name, of in self.document.get("depends_on", {}).items()}

    @property
    def replicas(self) -> int:
        return int(self.document.get("deploy", {}).get("replicas", 1))

    @property
    def grace(self) -> timedelta:
        """How long a stop may take."""
        return durations.parse(self.document.get("stop_grace_period", "10s"))


def document(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file, with its variables replaced."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: replaced(one) for name, one in value.items()}
        if isinstance(value, list):
            return [replaced(one) for one in value]
        if not isinstance(value, str):
            return value
        text = _VARIABLE.sub(lambda found: (variables or {}).get(found[1], found[2] or ""), value)
        return text.replace("$$", "$")

    found: dict[str, Any] = replaced(yaml.safe_load(FILE.read_text(encoding="utf-8")))
    return found


def services(profile: str | None = None) -> dict[str, ComposeService]:
    """The services that run with the profile; without one all of the file."""
    return {
        name: ComposeService(name, of)
        for name, of in document()["services"].items()
        if profile is None or profile in of.get("profiles", [profile])
    }


def in_order(of: Mapping[str, ComposeService]) -> Iterator[ComposeService]:
    """Yield the services, each after those that it waits for."""
    done: set[str] = set()
    while waiting := [one for one in of.values() if one.name not in done]:
        ready = [one for one in waiting if set(one.after) <= done]
        assert ready, f"they wait for each other: {[one.name for one in waiting]}"
        yield from ready
        done |= {one.name for one in ready}
