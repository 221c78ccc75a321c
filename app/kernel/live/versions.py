"""
Versions of the run-time settings: the values that hold over those of files, variables and command lines.

A change is validated as at a start, under a lock: two changes at the same time become two versions, and none is lost.

Every function runs in a transaction of its caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import text

from app.kernel import settings as all_settings
from app.kernel.database import UnitOfWork
from app.kernel.errors import Conflict, InvalidSettings, NotFound, Problem
from app.kernel.settings import Settings

#: Advisory lock of a change.
_LOCK = 7_205_759_403_795
#: Most characters of a reason, and of the name of an author.
MAX_REASON, MAX_AUTHOR = 1_000, 200

_COLUMNS = "version, values, changes, author, reason, reverted_to, created_at"
_ACQUIRE = text(f"SELECT pg_advisory_xact_lock({_LOCK})")
_NEWEST = text(f"SELECT {_COLUMNS} FROM setting_version ORDER BY version DESC LIMIT 1")
_ONE = text(f"SELECT {_COLUMNS} FROM setting_version WHERE version = :version")
_HISTORY = text(f"""
    SELECT {_COLUMNS} FROM setting_version WHERE version < :before ORDER BY version DESC LIMIT :limit
""")
_INSERT = text(f"""
    INSERT INTO setting_version (version, values, changes, author, reason, reverted_to)
    VALUES (:version, CAST(:values AS jsonb), CAST(:changes AS jsonb), :author, :reason, :reverted_to)
    RETURNING {_COLUMNS}
""")


@dataclass(frozen=True, slots=True)
class SettingVersion:
    """A version of the run-time settings."""

    #: 0 is the state before the first change.
    version: int = 0
    #: All run-time values, by dotted key.
    values: Mapping[str, Any] = field(default_factory=dict)
    #: By changed key, `before` and `now`; None where there was or is none.
    changes: Mapping[str, Any] = field(default_factory=dict)
    author: str = ""
    reason: str = ""
    reverted_to: int | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class SettingChange:
    """Who changes settings, and why."""

    author: str
    reason: str
    #: The version that the author has seen; with another one, the change is refused.
    expected: int | None = None


def lock(work: UnitOfWork) -> None:
    """Let no other change happen until the end of the transaction, so that a change can depend on what holds."""
    work.execute(_ACQUIRE)


def newest(work: UnitOfWork) -> SettingVersion:
    """Return the version that holds."""
    return work.row_of(SettingVersion, _NEWEST) or SettingVersion()


def get(work: UnitOfWork, version: int) -> SettingVersion:
    """Return a version. Raises NotFound."""
    if version == 0:
        return SettingVersion()
    found = work.row_of(SettingVersion, _ONE, {"version": version})
    if found is None:
        last = newest(work).version
        raise NotFound("version of the settings", str(version), [str(one) for one in range(last, -1, -1)][:20])
    return found


def history(work: UnitOfWork, *, before: int, limit: int) -> list[SettingVersion]:
    """Return versions from the newest to the oldest, below `before`."""
    return work.rows_of(SettingVersion, _HISTORY, {"before": before, "limit": limit})


def change(work: UnitOfWork, base: Settings, changes: Mapping[str, Any], by: SettingChange) -> SettingVersion:
    """
    Set run-time values, by dotted keys; None removes one, so that the value of `base` holds again.

    Raises InvalidSettings with every problem, Conflict when another version holds than expected.
    """
    _require_changeable(changes)
    work.execute(_ACQUIRE)
    current = newest(work)
    kept = {key: value for key, value in current.values.items() if key not in changes}
    given = {key: value for key, value in changes.items() if value is not None}
    return _store(work, base, current, kept | given, by)


def revert(work: UnitOfWork, base: Settings, version: int, by: SettingChange) -> SettingVersion:
    """
    Make the values of an earlier version hold again, as a new version; version 0 has none.

    Raises NotFound, Conflict; and InvalidSettings, when they are not valid any more.
    """
    work.execute(_ACQUIRE)
    return _store(work, base, newest(work), get(work, version).values, by, reverted_to=version)


def _store(
    work: UnitOfWork,
    base: Settings,
    current: SettingVersion,
    values: Mapping[str, Any],
    by: SettingChange,
    reverted_to: int | None = None,
) -> SettingVersion:
    if by.expected is not None and by.expected != current.version:
        message = f"version {current.version} of the settings holds, and not {by.expected}: look at it first"
        raise Conflict(message)
    valid = all_settings.with_values(base, values, "the request")
    now = {key: all_settings.shown(all_settings.value_of(valid, key)) for key in values}
    keys = sorted({*now, *current.values})
    changed = {
        key: {"before": current.values.get(key), "now": now.get(key)}
        for key in keys
        if current.values.get(key) != now.get(key)
    }
    if not changed:
        return current
    stored = {
        "version": current.version + 1,
        "values": json.dumps(now),
        "changes": json.dumps(changed),
        "author": by.author[:MAX_AUTHOR],
        "reason": by.reason[:MAX_REASON],
        "reverted_to": reverted_to,
    }
    found = work.row_of(SettingVersion, _INSERT, stored)
    assert found is not None, "an insert returns its row"
    return found


def _require_changeable(changes: Mapping[str, Any]) -> None:
    """Raises InvalidSettings for settings that exist and need a restart; unknown ones are found later."""
    able = all_settings.changeable()
    known = {key for key, _ in all_settings.values_of(Settings.model_construct())}
    wrong = [key for key in changes if key in known and key not in able]
    unknown = [key for key in changes if key not in known]
    problems = [
        Problem(key, "it cannot change while the processes run; set it in arriero.toml and restart", ", ".join(able))
        for key in wrong
    ]
    problems += [Problem(key[:100], "there is no such setting", ", ".join(able)) for key in unknown]
    if problems:
        raise InvalidSettings(problems)
