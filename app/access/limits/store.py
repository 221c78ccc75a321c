"""
The stored limits of keys and namespaces, and the copy of them in each process.

A call never waits for the database: the copy is read at the start and after each change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import text

from app.access.limits.limits import (
    NAMES,
    CallLimits,
    LimitOverride,
    LimitSubject,
    SubjectKind,
    effective,
)
from app.kernel import log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable
from app.kernel.sections.access import LimitSettings

_log = log.get(__name__)

_COLUMNS = f"kind, id, namespace, {', '.join(NAMES)}"
_LIST = text(f"SELECT {_COLUMNS} FROM call_limit ORDER BY kind, id")
_LIST_OF = text(f"SELECT {_COLUMNS} FROM call_limit WHERE namespace = :namespace ORDER BY kind, id")
_SET = text(f"""
    INSERT INTO call_limit ({_COLUMNS}) VALUES (:kind, :id, :namespace, {", ".join(f":{name}" for name in NAMES)})
    ON CONFLICT (kind, id) DO UPDATE SET updated_at = now(), namespace = :namespace,
        {", ".join(f"{name} = :{name}" for name in NAMES)}
""")
_CLEAR = text("DELETE FROM call_limit WHERE kind = :kind AND id = :id")


def overrides(work: UnitOfWork, namespace: str | None = None) -> dict[LimitSubject, LimitOverride]:
    """Return what was set, for all or for what belongs to one namespace."""
    rows = work.rows(_LIST) if namespace is None else work.rows(_LIST_OF, {"namespace": namespace})
    return {LimitSubject(SubjectKind(row.kind), row.id): _override(row) for row in rows}


def set_override(work: UnitOfWork, subject: LimitSubject, namespace: str, override: LimitOverride) -> None:
    """Set the limits of a key or namespace; they replace the earlier ones."""
    values = {name: getattr(override, name) for name in NAMES}
    work.run(_SET, {"kind": subject.kind, "id": subject.id, "namespace": namespace, **values})


def clear_override(work: UnitOfWork, subject: LimitSubject) -> bool:
    """Remove the limits of a key or namespace, so that those of the settings hold; False when there were none."""
    return work.run(_CLEAR, {"kind": subject.kind, "id": subject.id}) == 1


class CallLimitTable:
    """The limits of all keys and namespaces, as this process knows them."""

    def __init__(self, defaults: LimitSettings) -> None:
        #: The settings of this moment.
        self.defaults = defaults
        self._overrides: Mapping[LimitSubject, LimitOverride] = {}

    def of(self, subject: LimitSubject) -> CallLimits:
        """Return the limits that hold for a key or namespace."""
        return effective(subject.kind, self.defaults, self._overrides.get(subject))

    def refresh(self, database: Database) -> None:
        """Read the stored limits. While the database does not answer, nothing changes; this is logged."""
        try:
            with database.work() as work:
                self._overrides = overrides(work)
        except DatabaseUnreachable as error:
            _log.warning("limits_not_read", error=str(error))


def _override(row: Any) -> LimitOverride:
    return LimitOverride(**{name: getattr(row, name) for name in NAMES})
