"""
The statements of channels.

Every function runs in a transaction of its caller.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import text

from app.governance.alerts.channels import AlertChannel
from app.kernel.database import UnitOfWork

#: Most channels of a namespace.
MOST = 100

_COLUMNS = "namespace, name, document, disabled"
_PUT = text("""
    INSERT INTO alert_channel (namespace, name, document, disabled)
    VALUES (:namespace, :name, CAST(:document AS json), '')
    ON CONFLICT (namespace, name) DO UPDATE SET document = CAST(:document AS json), disabled = '', updated_at = now()
    RETURNING (xmax = 0) AS created
""")
_GET = text(f"SELECT {_COLUMNS} FROM alert_channel WHERE namespace = :namespace AND name = :name")
_PAGE = text(f"""
    SELECT {_COLUMNS} FROM alert_channel WHERE (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
    ORDER BY namespace, name LIMIT 1000
""")
_DELETE = text("DELETE FROM alert_channel WHERE namespace = :namespace AND name = :name")
_DISABLE = text("UPDATE alert_channel SET disabled = :reason WHERE namespace = :namespace AND name = :name")
_COUNT = text("SELECT count(*) AS channels FROM alert_channel WHERE namespace = :namespace")


def put(work: UnitOfWork, namespace: str, name: str, document: Any) -> bool:
    """Store a channel under its name, and enable it. Returns False when it replaced another one."""
    values = {"namespace": namespace, "name": name, "document": json.dumps(document)}
    return bool(work.rows(_PUT, values)[0].created)


def find(work: UnitOfWork, namespace: str, name: str) -> AlertChannel | None:
    """Return a channel, or None."""
    return work.row_of(AlertChannel, _GET, {"namespace": namespace, "name": name})


def page(work: UnitOfWork, namespace: str | None) -> list[AlertChannel]:
    """Return the channels of a namespace, or of all."""
    return work.rows_of(AlertChannel, _PAGE, {"namespace": namespace})


def count(work: UnitOfWork, namespace: str) -> int:
    """Return how many channels a namespace has."""
    return int(work.rows(_COUNT, {"namespace": namespace})[0].channels)


def delete(work: UnitOfWork, namespace: str, name: str) -> bool:
    """Delete a channel; False when there is none."""
    return work.run(_DELETE, {"namespace": namespace, "name": name}) == 1


def disable(work: UnitOfWork, namespace: str, name: str, reason: str) -> None:
    """Send nothing more to a channel until it is stored again."""
    work.execute(_DISABLE, {"namespace": namespace, "name": name, "reason": reason})
