"""
Entries of the audit log for commands that change something themselves, without the API.

Such a command needs no database to do its work: where none answers, its log line is all that tells of it.
"""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from typing import Any

import psycopg

from app.access.audit import log as audit_log
from app.access.audit.entry import summary_of
from app.access.audit.log import AuditRecord
from app.kernel import addresses, log
from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable
from app.kernel.settings import Settings

_log = log.get(__name__)


def record_of(action: str, target: Mapping[str, str], content: Any) -> AuditRecord:
    """Return the entry of a command that succeeds, for its own transaction."""
    return AuditRecord(_actor(), action, 0, target=target, summary=summary_of(content))


def note(database: Database, action: str, target: Mapping[str, str], content: Any) -> None:
    """Write the entry of a command that has succeeded. A failure is logged."""
    try:
        audit_log.add_all(database, [record_of(action, target, content)])
    except (DatabaseUnreachable, psycopg.Error) as error:
        _log.warning("audit_entry_not_written", action=action, target=dict(target), error=str(error).partition("\n")[0])


def note_if_reachable(settings: Settings, action: str, target: Mapping[str, str], content: Any) -> None:
    """As `note`, where the database of the installation is known."""
    url = addresses.find_database(settings)
    if url is not None:
        database = Database(url, pool_size=1)
        try:
            note(database, action, target, content)
        finally:
            database.close()


def _actor() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without an entry, as in some containers
        user = "unknown user"
    return f"command line ({user})"
