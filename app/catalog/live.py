"""
The live catalogue: the catalogues of an installation, read again when one of their files has changed.

So an entry that `arriero models pull` adds is served without a restart. A file that is invalid after a change is logged
once, and what was read before stays in force.
"""

from __future__ import annotations

import threading
from pathlib import Path

from app.catalog import files
from app.catalog.catalog import Catalog
from app.kernel import log
from app.kernel.errors import InvalidCatalog
from app.kernel.settings import Settings

_log = log.get(__name__)

_Version = tuple[tuple[int, ...] | None, ...]


class LiveCatalog:
    """The catalogues that the settings name. Safe for threads."""

    def __init__(self, settings: Settings) -> None:
        """Read the catalogues. Raises InvalidCatalog."""
        self._paths = (*settings.catalog.files, files.own_catalog(settings.data_dir))
        self._settings, self._lock = settings, threading.Lock()
        self._version: _Version = self._look()
        self._catalog = files.catalog_of(settings)

    def current(self) -> Catalog:
        """Returns the catalogue of this moment, which is immutable."""
        with self._lock:
            version = self._look()
            if version != self._version:
                self._version = version
                try:
                    self._catalog = files.catalog_of(self._settings)
                except InvalidCatalog as error:
                    _log.error("catalog_is_invalid", error=str(error), kept="the catalogue before the change")
                else:
                    _log.info("catalog_read_again", models=len(self._catalog.models))
            return self._catalog

    def _look(self) -> _Version:
        return tuple(_version(path.expanduser()) for path in self._paths)


def _version(path: Path) -> tuple[int, ...] | None:
    """A value that differs when the file was changed; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
