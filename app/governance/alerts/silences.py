"""
Silences: alerts that are not sent for a while. They are opened, counted and resolved all the same.

The statements run in a transaction of the caller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.governance.alerts.alert import matches
from app.kernel import ids
from app.kernel.database import UnitOfWork

#: Most silences that are in force at a time, of all namespaces.
MOST = 1_000
#: The longest one.
LONGEST = timedelta(days=90)

_COLUMNS = "id, namespace, matchers, starts_at, ends_at, comment, author, created_at"
_INSERT = text(f"""
    INSERT INTO alert_silence (id, namespace, matchers, starts_at, ends_at, comment, author)
    VALUES (:id, :namespace, CAST(:matchers AS json), now(), now() + CAST(:time AS interval), :comment, :author)
    RETURNING {_COLUMNS}
""")
_ACTIVE = text(f"SELECT {_COLUMNS} FROM alert_silence WHERE ends_at > now() ORDER BY ends_at LIMIT {MOST}")
_PAGE = text(f"""
    SELECT {_COLUMNS} FROM alert_silence
    WHERE (CAST(:namespace AS text) IS NULL OR namespace = :namespace) AND (:ended OR ends_at > now())
    ORDER BY ends_at DESC LIMIT {MOST}
""")
_END = text(f"""
    UPDATE alert_silence SET ends_at = LEAST(ends_at, now())
    WHERE id = :id AND (CAST(:namespace AS text) IS NULL OR namespace = :namespace) RETURNING {_COLUMNS}
""")
_LOOK_AGAIN = text("""
    UPDATE alert SET due_at = now() WHERE state = 'open' AND namespace = :namespace AND due_at > now()
      AND notifications = 0 AND (quiet_until IS NULL OR quiet_until <= now())
""")
_REMOVE = text("DELETE FROM alert_silence WHERE ends_at < now() - CAST(:retention AS interval)")


@dataclass(frozen=True, slots=True)
class AlertSilence:
    """A silence, as it is stored."""

    id: UUID
    namespace: str
    #: By label, the value that an alert must have; with `*` at its end, its beginning.
    matchers: dict[str, Any]
    starts_at: datetime
    ends_at: datetime
    comment: str
    author: str
    created_at: datetime


def add(
    work: UnitOfWork, namespace: str, matchers: Mapping[str, str], time: timedelta, comment: str, author: str
) -> AlertSilence:
    """Silence the alerts of a namespace with these labels, from now on."""
    values = {"id": ids.new_id(), "namespace": namespace, "matchers": json.dumps(dict(matchers)), "time": time}
    found = work.row_of(AlertSilence, _INSERT, {**values, "comment": comment, "author": author})
    assert found is not None, "an insert returns its row"
    return found


def active(work: UnitOfWork) -> list[AlertSilence]:
    """Return the silences that are in force."""
    return work.rows_of(AlertSilence, _ACTIVE)


def page(work: UnitOfWork, namespace: str | None, *, ended: bool) -> list[AlertSilence]:
    """Return silences of a namespace, or of all; those that have ended only if they are wanted."""
    return work.rows_of(AlertSilence, _PAGE, {"namespace": namespace, "ended": ended})


def end(work: UnitOfWork, id_: UUID, namespace: str | None) -> AlertSilence | None:
    """End a silence now. What it held back is sent soon, as far as it is still open."""
    found = work.row_of(AlertSilence, _END, {"id": id_, "namespace": namespace})
    if found is not None:
        work.execute(_LOOK_AGAIN, {"namespace": found.namespace})
    return found


def silencing(silences: Iterable[AlertSilence], namespace: str, labels: Mapping[str, str]) -> AlertSilence | None:
    """Return the silence of an alert that ends last; None without one."""
    found = [one for one in silences if one.namespace == namespace and matches(one.matchers, labels)]
    return max(found, key=lambda one: one.ends_at, default=None)


def remove(work: UnitOfWork, retention: timedelta) -> int:
    """Remove silences that ended so long ago."""
    return work.run(_REMOVE, {"retention": retention})
