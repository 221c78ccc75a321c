"""
A scan: the GGUF files below a folder, each as an entry for a catalogue or as a refusal with its reason.

No file is passed over in silence: a damaged one, a projector, an adapter or a part without its others is named. None of
them ends the scan, whatever it holds and whatever it is.
The parts of a split model are one entry. A file that two links name is one entry.
Names are made from the header and are unique, also against those that are taken.
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

#: Context and slots of a suggested entry: what fits most machines. The context is less if the model has less.
CONTEXT, SLOTS = 4096, 4

#: Characters of the end of a part's name: `00002-of-00003.gguf`.
_PART = 19
#: Characters of a reason.
_SENTENCE = 1_000
#: A file that breaks the reader is refused, and hides none of the others.
_GUARD = LoopGuard()

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
class RefusedFile:
    """A file that cannot be served, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What lies below a folder, by path."""

    found: tuple[Found, ...]
    refused: tuple[RefusedFile, ...]


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
    refused: list[RefusedFile] = []
    for path in _candidates(folder, refused):
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # a link that leads to itself
            refused.append(RefusedFile(path, "it is a link that leads to itself"))
            continue
        if target in seen:
            continue
        seen.add(target)
        with _GUARD.item("file", str(path)) as failed:
            one = _look_at(path, slugs)
            if isinstance(one, Found):
                slugs.add(slug(one.model.name))
                found.append(one)
            else:
                refused.append(one)
        if failed:
            refused.append(RefusedFile(path, f"it cannot be read: {type(failed[0]).__name__}: {failed[0]}"))
    return Scan(tuple(found), tuple(_printable(one) for one in refused))


def _look_at(path: Path, slugs: Collection[str]) -> Found | RefusedFile:
    try:
        str(path).encode()
        read = header.read(path)
    except UnicodeEncodeError:
        return RefusedFile(path, "its name is no UTF-8, so that no catalogue can name it; rename it")
    except ModelFileDamaged as error:
        return RefusedFile(path, error.reason)
    except ModelFileMissing as error:
        return RefusedFile(path, str(error))
    if reason := _objection(read):
        return RefusedFile(path, reason)
    return Found(_entry(read, _name(read, slugs)), read)


def _printable(one: RefusedFile) -> RefusedFile:
    """A name may hold what a terminal acts on, or what is no character."""
    path = Path(texts.printable(os.fsencode(one.path).decode(errors="replace")))
    return RefusedFile(path, texts.printable(one.reason, _SENTENCE))


def _candidates(folder: Path, refused: list[RefusedFile]) -> Iterator[Path]:
    """Each GGUF file once, a split model by its first part; a part without a first one stands for itself."""

    def refuse(error: OSError) -> None:
        refused.append(RefusedFile(Path(error.filename), f"this folder cannot be read: {error.strerror}"))

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(name for name in names if name.lower().endswith(".gguf")):
            number = split_number(name)
            if number is None or number[0] == 1 or f"{name[:-_PART]}00001{name[5 - _PART :]}" not in names:
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
