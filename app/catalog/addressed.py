"""
Files by their content: those of a model whose SHA-256 the catalogue names.

Such a file may come from anywhere, because whoever receives it can tell whether it is the right one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.catalog import files
from app.catalog.model import Model
from app.catalog.source import ServerSource
from app.kernel.errors import ModelFileMissing, ModelFileUnusable


@dataclass(frozen=True, slots=True)
class AddressedFile:
    """A file of a model on this host, whether it is there or not."""

    path: Path
    #: The hash of its content, as 64 hexadecimal digits.
    sha256: str
    #: Its bytes, if the catalogue names them.
    size: int | None

    @property
    def is_here(self) -> bool:
        """Whether there is a file of this size. Its content is not read."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return self.size is None or found.st_size == self.size


def of(model: Model, data_dir: Path) -> list[AddressedFile]:
    """
    Return all files of a model: its parts, its adapters, its projector and its draft model.

    Raises ModelFileMissing when a path depends on a package that is not installed, and ModelFileUnusable when the
    catalogue names no SHA-256 of a file.
    """
    found: list[AddressedFile] = []
    for one in _with_own_source(model):
        paths = files.file_paths(one, data_dir)
        if len(one.source.sha256) != len(paths):
            raise ModelFileUnusable(
                f"the catalogue names no sha256 of {paths[0].name}, so it can come from its source only"
            )
        sizes: tuple[int | None, ...] = one.source.size or (None,) * len(paths)
        found += map(AddressedFile, paths, one.source.sha256, sizes)
    return found


def here(model: Model, data_dir: Path) -> list[AddressedFile]:
    """Return the files of a model that are on this host. A model without a SHA-256, or without files, has none."""
    try:
        return [file for file in of(model, data_dir) if file.is_here]
    except (ModelFileMissing, ModelFileUnusable):
        return []


def _with_own_source(model: Model) -> Iterator[Model]:
    if isinstance(model.source, ServerSource):
        return
    yield model
    yield from files.companions(model)
