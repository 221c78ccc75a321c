"""The job of the watched folder."""

from __future__ import annotations

from collections.abc import Mapping

from app.kernel import log
from app.memory.personal.importing import FolderImport, import_folder
from workers.passes import time_limit
from workers.runtime import Runtime

_log = log.get(__name__)

#: Most seconds of a pass; the next one goes on.
_SECONDS = 5.0


def run_import_folder(runtime: Runtime) -> Mapping[str, object] | None:
    """
    Import the files of the watched folder that have changed: see `app.memory.personal.importing`.

    Raises FolderUnreadable, DatabaseUnreachable.
    """
    settings = runtime.settings.context
    if settings.folder is None:
        return None
    done = import_folder(runtime.runs.database, settings, time_limit(_SECONDS))
    if done == FolderImport():
        return None
    found = {"stored": done.stored, "removed": done.removed, "refused": done.refused}
    _log.info("context_folder_imported", **found)
    return found
