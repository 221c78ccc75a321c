"""The job of the watched folder. One process never runs it twice at the same time."""

from __future__ import annotations

from app.kernel import log
from app.kernel.errors import Unavailable
from app.memory.personal.folder import FolderUnreadable
from app.memory.personal.importing import FolderImport, import_folder
from app.memory.personal.tasks import IMPORT_FOLDER
from workers.passes import exclusive, time_limit
from workers.runtime import Runtime

_log = log.get(__name__)

#: Most seconds of a pass; the next one goes on.
_SECONDS = 5.0

#: Why the folder could not be read last; a reason is logged once.
_REASONS: list[str] = []


def run_import_folder(runtime: Runtime) -> None:
    """Import the files of the watched folder that have changed: see `app.memory.personal.importing`."""
    settings = runtime.settings.context
    if settings.folder is None:
        return
    with exclusive(IMPORT_FOLDER) as acquired:
        if not acquired:
            return
        try:
            done = import_folder(runtime.runs.database, settings, time_limit(_SECONDS))
            _REASONS.clear()
            if done != FolderImport():
                _log.info("context_folder_imported", stored=done.stored, removed=done.removed, refused=done.refused)
        except FolderUnreadable as error:
            if [str(error)] != _REASONS:
                _REASONS[:] = [str(error)]
                _log.warning("context_folder_unreadable", error=str(error))
        except Unavailable as error:
            _log.warning("context_import_postponed", error=str(error))
