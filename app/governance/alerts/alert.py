"""
Alerts: what people are told about.

    open -> acknowledged -> resolved
    open -> resolved

An alert is opened by the first firing of a rule with certain labels, counts further ones, and is resolved when the rule
clears, or by hand. The same rule with the same labels has the same fingerprint, and at most one open alert.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID


class AlertState(StrEnum):
    """Where an alert is."""

    OPEN = "open"
    #: Somebody takes care: it is not sent again.
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"


class AlertEventKind(StrEnum):
    """What happened to an alert."""

    OPENED = "opened"
    NOTIFIED = "notified"
    SILENCED = "silenced"
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert, as it is stored."""

    id: UUID
    namespace: str
    fingerprint: str
    rule: str
    severity: str
    summary: str
    labels: dict[str, Any]
    value: float | None
    group_key: str
    channels: list[str]
    state: str
    count: int
    first_at: datetime
    last_at: datetime
    cooldown: timedelta
    repeat: timedelta | None
    quiet_until: datetime | None
    due_at: datetime | None
    notified_at: datetime | None
    notifications: int
    tell_end: bool
    acknowledged_at: datetime | None
    acknowledged_by: str
    resolved_at: datetime | None
    resolved_by: str


def fingerprint(rule: str, labels: Mapping[str, str]) -> str:
    """Return the fingerprint of the alerts of a rule with these labels: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps([rule, sorted(labels.items())]).encode()).hexdigest()[:32]


def all_labels(rule: str, severity: str, labels: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels by which alerts are grouped and silenced: those of the firing, its rule and its severity."""
    return {**{name: str(value) for name, value in labels.items()}, "rule": rule, "severity": severity}


def group_key(by: Collection[str], labels: Mapping[str, str]) -> str:
    """Return the key of a group: the values of these labels."""
    return json.dumps({name: labels.get(name, "") for name in sorted(by)})


def matches(matchers: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether an alert with these labels has the values of a silence. A value that ends with `*` is a beginning."""
    return all(_equal(str(value), labels.get(name, "")) for name, value in matchers.items())


def _equal(wanted: str, value: str) -> bool:
    return value.startswith(wanted[:-1]) if wanted.endswith("*") else value == wanted
