"""
A scan: the GGUF files below a folder, each as an entry for a catalogue or as a refusal with its reason.

No file is passed over in silence: a damaged one, a projector, an adapter or a part without its others is named.
The parts of a split model are one entry. A file that two links name is one entry.
Names are made from the header and are unique, also against those that are taken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.fleet import header
from app.fleet.anatomy import Header
from app.fleet.model import Model, slug
from app.fleet.source import FileSource, split_number, split_parts
from app.kernel.errors import ModelFileDamaged, ModelFileMissing, NotFound

#: Context and slots of a suggested entry: what fits most machines. The context is less if the model has less.
CONTEXT, SLOTS = 4096, 4

_OTHER_KINDS = {
    "mmproj": "it is a projector (mmproj) for images or sound, which belongs to a model and is none itself",
    "adapter": "it is an adapter (LoRA), which belongs to a model and is none itself",
    "imatrix": "it is an importance matrix, which is used to quantise a model",
}
_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:x\d+)?(?:\.\d+)?[kmbt](?:-a\d+(?:\.\d+)?[mb])?)(?![a-z0-9])")


@dataclass(frozen=True, slots=True)
class Found:
    """A model that can be served, and the entry for it."""

    model: Model
    header: Header


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that cannot be served, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What lies below a folder, by path."""

    found: tuple[Found, ...]
    refused: tuple[Refused, ...]


def scan(folder: Path, taken: Collection[str] = ()) -> Scan:
    """
    Read the headers of all GGUF files below `folder`.

    `taken` are names that no entry may have. Raises NotFound when there is no such folder.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise NotFound("folder", str(folder))
    slugs = {slug(name) for name in taken}
    seen: set[Path] = set()
    found: list[Found] = []
    refused: list[Refused] = []
    for path in _candidates(folder, refused):
        target = path.resolve()
        if target in seen:
            continue
        seen.add(target)
        try:
            read = header.read(path)
        except ModelFileDamaged as error:
            refused.append(Refused(path, error.reason))
            continue
        except ModelFileMissing as error:
            refused.append(Refused(path, str(error)))
            continue
        if reason := _objection(read):
            refused.append(Refused(path, reason))
            continue
        name = _name(read, slugs)
        slugs.add(slug(name))
        found.append(Found(_entry(read, name), read))
    return Scan(tuple(found), tuple(refused))


def _candidates(folder: Path, refused: list[Refused]) -> Iterator[Path]:
    """Each GGUF file once, a split model by its first part; a part without a first one stands for itself."""

    def refuse(error: OSError) -> None:
        refused.append(Refused(Path(error.filename), f"this folder cannot be read: {error.strerror}"))

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(name for name in names if name.lower().endswith(".gguf")):
            number = split_number(name)
            if number is None or number[0] == 1 or split_parts(name)[0] not in names:
                yield Path(root, name)


def _objection(read: Header) -> str | None:
    if read.kind in _OTHER_KINDS:
        return _OTHER_KINDS[read.kind]
    if read.kind != "model":
        return f"it is of the kind {read.kind!r}, not a model"
    if not read.tensors:
        return "it has no tensors: it is a vocabulary alone"
    return None


def _entry(read: Header, name: str) -> Model:
    uses = ("embed",) if _embeds(read) else ("chat",) if read.chat_template else ("complete",)
    return Model(
        name=name,
        description=f"{read.name}, {read.quantisation}",
        licence=read.licence or "",
        use_cases=uses,
        context=max(32, min(read.context_length or CONTEXT, CONTEXT)),
        slots=SLOTS,
        source=FileSource(path=str(read.path)),
    )


def _embeds(read: Header) -> bool:
    return read.pools or "bert" in read.architecture


def _name(read: Header, slugs: Collection[str]) -> str:
    """`family:size`; with the quantisation, and then a number, where that is needed to be unique."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", read.path.stem)
    known = read.metadata.get("general.basename")
    text = _word(known if isinstance(known, str) else stem)
    size = _word(read.size_label or "") or (match[1] if (match := _SIZE.search(stem.lower())) else "")
    family = _word(re.sub(rf"(?<![a-z0-9]){re.escape(size)}.*", "", text) if size else text) or _word(read.architecture)
    size = size or _word(read.quantisation) or "gguf"
    first = f"{family[:30]}:{size[:12]}"
    full = f"{first}-{_word(read.quantisation)}" if _word(read.quantisation) not in size else first
    candidates = [first, full, *(f"{full}-{number}" for number in range(2, len(slugs) + 3))]
    return next(name for name in candidates if slug(name) not in slugs)


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")
