"""
A folder scan: finds the GGUF files in a folder; each becomes a catalogue entry or a rejected file with a reason.

No file is skipped silently: a damaged file, a projector, an adapter or an incomplete split model is reported. No file
ends the scan, whatever it contains.
The parts of a split model are one entry. A file that is found under several links is one entry.
Names are derived from the header; they are unique and differ from the names that the caller already uses.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.catalog import header
from app.catalog.metadata import Header
from app.catalog.model import Model, slug
from app.catalog.registration import suggestion
from app.catalog.source import FileSource, split_number
from app.kernel.errors import ModelFileDamaged, ModelFileMissing, NotFound
from app.kernel.loop_guard import LoopGuard
from app.kernel.security import texts

#: Length of the end of a part's name: `00002-of-00003.gguf`.
_PART_SUFFIX = 19
#: Maximum characters of a reason.
_MAX_REASON = 1_000
#: An unexpected error rejects one file, and the scan continues.
_GUARD = LoopGuard()


@dataclass(frozen=True, slots=True)
class ScannedModel:
    """A model that can be served, with its suggested entry."""

    model: Model
    header: Header


@dataclass(frozen=True, slots=True)
class RefusedFile:
    """A file that cannot be served, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """The result of a scan, in the order of the paths."""

    found: tuple[ScannedModel, ...]
    refused: tuple[RefusedFile, ...]


def scan(folder: Path, used_names: Collection[str] = ()) -> Scan:
    """
    Scans all GGUF files in `folder` and its subfolders.

    Entries get none of `used_names`. Raises NotFound when the folder does not exist.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise NotFound("folder", str(folder))
    slugs = {slug(name) for name in used_names}
    seen: set[Path] = set()
    found: list[ScannedModel] = []
    refused: list[RefusedFile] = []
    for path in _candidates(folder, refused):
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # a cycle of symbolic links
            refused.append(RefusedFile(path, "it is a symbolic link that leads to itself"))
            continue
        if target in seen:
            continue
        seen.add(target)
        with _GUARD.item("file", str(path)) as failed:
            one = _inspect(path, slugs)
            if isinstance(one, ScannedModel):
                slugs.add(slug(one.model.name))
                found.append(one)
            else:
                refused.append(one)
        if failed:
            refused.append(RefusedFile(path, f"it cannot be read: {type(failed[0]).__name__}: {failed[0]}"))
    return Scan(tuple(found), tuple(_printable(one) for one in refused))


def _inspect(path: Path, slugs: Collection[str]) -> ScannedModel | RefusedFile:
    try:
        str(path).encode()
        read = header.read(path)
    except UnicodeEncodeError:
        return RefusedFile(path, "its name is not UTF-8, so no catalogue can name it; rename it")
    except ModelFileDamaged as error:
        return RefusedFile(path, error.reason)
    except ModelFileMissing as error:
        return RefusedFile(path, str(error))
    if reason := suggestion.unservable(read):
        return RefusedFile(path, reason)
    source = FileSource(path=str(read.path))
    return ScannedModel(suggestion.suggest(read, source, suggestion.unique_name(read, slugs)), read)


def _printable(one: RefusedFile) -> RefusedFile:
    """Replaces control characters and invalid characters: a file name may contain them."""
    path = Path(texts.printable(os.fsencode(one.path).decode(errors="replace")))
    return RefusedFile(path, texts.printable(one.reason, _MAX_REASON))


def _candidates(folder: Path, refused: list[RefusedFile]) -> Iterator[Path]:
    """Yields each GGUF file; of a split model only the first part, or every part when the first is missing."""

    def refuse(error: OSError) -> None:
        refused.append(RefusedFile(Path(error.filename), f"this folder cannot be read: {error.strerror}"))

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(name for name in names if name.lower().endswith(".gguf")):
            number = split_number(name)
            first = f"{name[:-_PART_SUFFIX]}00001{name[5 - _PART_SUFFIX :]}"
            if number is None or number[0] == 1 or first not in names:
                yield Path(root, name)
