"""The file of an embedding model that this pool has loaded, known by its hash: another file makes other vectors."""

from __future__ import annotations

import hashlib
from pathlib import Path

from app.catalog import files, install
from app.catalog.source import split_parts


class LoadedModelFile:
    """A model file as it was loaded. Safe for threads: the hash may be computed twice."""

    def __init__(self, path: Path) -> None:
        """To be made before the file is loaded."""
        self._path, self._version = path, files.file_version(path)
        self._digest: str | None = None

    def digest(self) -> str | None:
        """Return the beginning of the SHA-256 of all parts; None if the file was replaced after it was loaded."""
        if self._digest is None:
            whole = hashlib.sha256()
            for name in split_parts(self._path.name):
                try:
                    whole.update(install.sha256_of(self._path.parent / name).digest())
                except OSError:
                    return None
            if files.file_version(self._path) != self._version:
                return None
            self._digest = whole.hexdigest()[:16]
        return self._digest
