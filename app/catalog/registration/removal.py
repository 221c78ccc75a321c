"""
Removal of downloaded files: of one model, unless another entry has the same file.

Only files in the data directory are removed: what a path names, or a package brings, belongs to others.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from app.catalog import files, install
from app.catalog.model import Model
from app.kernel.errors import ModelFileMissing


def removable(model: Model, data_dir: Path) -> tuple[Path, ...]:
    """Returns the downloaded files of a model that exist, with those of its adapters."""
    folder = data_dir / files.FOLDER
    return tuple(path for path in _paths(model, data_dir) if path.is_relative_to(folder) and path.exists())


def remove_files(model: Model, others: Iterable[Model], data_dir: Path) -> tuple[int, tuple[str, ...]]:
    """
    Removes the downloaded files of a model that no other entry has, with what a download left behind.

    Returns the bytes that are free again, and the names of entries that share files, which are then kept.
    """
    shared: dict[Path, str] = {}
    for other in others:
        if other.name != model.name:
            shared |= dict.fromkeys(_paths(other, data_dir), other.name)
    freed, keepers = 0, set()
    for path in removable(model, data_dir):
        if path in shared:
            keepers.add(shared[path])
            continue
        with install.lock(path, lambda _: None):
            freed += path.stat().st_size
            for suffix in ("", ".json", ".part", ".part.json"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        _remove_empty_folders(path.parent, data_dir / files.FOLDER)
    return freed, tuple(sorted(keepers))


def _paths(model: Model, data_dir: Path) -> tuple[Path, ...]:
    found: list[Path] = []
    for one in (model, *files.companions(model)):
        try:
            found += files.file_paths(one, data_dir)
        except ModelFileMissing:  # its package is not installed
            continue
    return tuple(found)


def _remove_empty_folders(folder: Path, end: Path) -> None:
    while folder != end and folder.is_relative_to(end) and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
