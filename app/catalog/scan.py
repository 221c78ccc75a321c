"""
A folder scan: finds the GGUF files in a folder; each becomes a catalogue entry or a rejected file with a reason.

No file is skipped silently: a damaged file, a projector, an adapter or an incomplete split model is reported. No file
ends the scan, whatever it contains.
The parts of a split model are one entry. A file that is found under several links is one entry.
Names are derived from the header; they are unique and differ from the names that the caller already uses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.catalog import header
from app.catalog.metadata import Header
from app.catalog.model import Model, slug
from app.catalog.source import FileSource, split_number
from app.kernel.errors import ModelFileDamaged, ModelFileMissing, NotFound
from app.kernel.loop_guard import LoopGuard
from app.kernel.security import texts

#: Context and slots of a suggested entry: suitable for most machines. The context never exceeds that of the model.
DEFAULT_CONTEXT, DEFAULT_SLOTS = 4096, 4

#: Length of the end of a part's name: `00002-of-00003.gguf`.
_PART_SUFFIX = 19
#: Maximum characters of a reason.
_MAX_REASON = 1_000
#: An unexpected error rejects one file, and the scan continues.
_GUARD = LoopGuard()

_OTHER_KINDS = {
    "mmproj": "it is a projector (mmproj) for images or sound, which is used with a model and is not a model itself",
    "adapter": "it is an adapter (LoRA), which is used with a model and is not a model itself",
    "imatrix": "it is an importance matrix, which is used to quantise a model",
}
_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:x\d+)?(?:\.\d+)?[kmbt](?:-a\d+(?:\.\d+)?[mb])?)(?![a-z0-9])")


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
    if reason := _unservable(read):
        return RefusedFile(path, reason)
    return ScannedModel(_entry(read, _unique_name(read, slugs)), read)


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


def _unservable(read: Header) -> str | None:
    if read.kind in _OTHER_KINDS:
        return _OTHER_KINDS[read.kind]
    if read.kind != "model":
        return f"its type is {read.kind!r}, not a model"
    if not read.tensors:
        return "it has no tensors: it is only a vocabulary"
    return None


def _entry(read: Header, name: str) -> Model:
    uses = ("embed",) if _is_embedding_model(read) else ("chat",) if read.chat_template else ("complete",)
    return Model(
        name=name,
        description=f"{read.name}, {read.quantisation}",
        licence=read.licence or "",
        use_cases=uses,
        context=max(32, min(read.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)),
        slots=DEFAULT_SLOTS,
        source=FileSource(path=str(read.path)),
    )


def _is_embedding_model(read: Header) -> bool:
    return read.has_pooling_type or "bert" in read.architecture


def _unique_name(read: Header, slugs: Collection[str]) -> str:
    """Returns `family:size`; the quantisation, and then a number, are appended if this is needed to be unique."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", read.path.stem)
    known = read.metadata.get("general.basename")
    text = _name_part(known if isinstance(known, str) else stem)
    size = _name_part(read.size_label or "") or (match[1] if (match := _SIZE.search(stem.lower())) else "")
    before_size = re.sub(rf"(?<![a-z0-9]){re.escape(size)}.*", "", text) if size else text
    family = _name_part(before_size) or _name_part(read.architecture)
    size = size or _name_part(read.quantisation) or "gguf"
    first = f"{family[:30]}:{size[:12]}"
    full = f"{first}-{_name_part(read.quantisation)}" if _name_part(read.quantisation) not in size else first
    candidates = [first, full, *(f"{full}-{number}" for number in range(2, len(slugs) + 3))]
    return next(name for name in candidates if slug(name) not in slugs)


def _name_part(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")
