"""
The catalogue of a data directory: the file in which `arriero models pull` writes entries, and people edit them.

What people wrote stays as it is: an entry is added at the end, and replaced or removed as the lines that it has.
A change is made under a lock, checked by reading the result, and appears as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

from app.catalog import catalog, files
from app.catalog.catalog import Catalog
from app.catalog.model import Model, slug
from app.kernel.errors import Conflict

_HEAD = """\
# Models that `arriero models pull` added on this host. Edit the entries as you like: running processes read them again.
# The keys are explained in docs/models.md; `arriero models rm NAME` removes an entry and its file.
"""
_HEADER = re.compile(r"^\s*\[\[\s*models\s*\]\]")
_COMMENT = re.compile(r"^\s*#")


def read(data_dir: Path) -> Catalog:
    """Returns the catalogue of the data directory, which may be empty. Raises InvalidCatalog."""
    path = files.own_catalog(data_dir)
    return files.read_file(path) if path.exists() else Catalog()


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Locks the catalogue of the data directory against changes by other processes."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.own_catalog(data_dir).with_suffix(".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def put(model: Model, data_dir: Path, used_slugs: Collection[str], comment: str, *, replace: bool) -> None:
    """
    Adds the entry of a model, or with `replace` puts it in the place of the entry with its name. The caller holds the
    lock.

    `used_slugs` are those of the other catalogues. `comment` is a line above the entry.

    Raises Conflict when another model has the name, or a name with the same slug; and InvalidCatalog when the file that
    exists is invalid.
    """
    own = read(data_dir)
    exists = own.find(model.name) is not None
    if (exists and not replace) or (not exists and model.slug in {*used_slugs, *(slug(name) for name in own.names)}):
        raise Conflict(f"{model.name} is already in the catalogue, or a name that is as good as equal")
    entry = f"# {comment}\n{catalog.to_toml([model])}"
    text = _text(data_dir)
    if exists:
        text = _without(text, own, model.name)
    expected = (*(other for other in own if other.name != model.name), model)
    _write(data_dir, f"{text.rstrip()}\n\n{entry}" if text.strip() else f"{_HEAD}\n{entry}", expected)


def remove(name: str, data_dir: Path) -> bool:
    """Removes the entry of that name; returns False when there is none. The caller holds the lock."""
    own = read(data_dir)
    if own.find(name) is None:
        return False
    text = _without(_text(data_dir), own, name)
    _write(data_dir, text, tuple(other for other in own if other.name != name))
    return True


def _text(data_dir: Path) -> str:
    path = files.own_catalog(data_dir)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _without(text: str, own: Catalog, name: str) -> str:
    """Returns the text of the catalogue without an entry, and without the comment that stands directly above it."""
    lines = text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if _HEADER.match(line)]
    if len(starts) > len(own.models):  # a text of several lines contains such a line
        starts = [number for number in starts if _is_toml("".join(lines[:number]))]
    index = own.names.index(name)
    if index >= len(starts):
        return text  # the entries are written in another form; `_write` finds that nothing was removed
    start = _with_comment(lines, starts[index])
    end = _with_comment(lines, starts[index + 1]) if index + 1 < len(starts) else len(lines)
    return "".join(lines[:start] + lines[end:])


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _with_comment(lines: list[str], start: int) -> int:
    while start and _COMMENT.match(lines[start - 1]):
        start -= 1
    return start


def _write(data_dir: Path, text: str, expected: tuple[Model, ...]) -> None:
    path = files.own_catalog(data_dir)
    found = catalog.parse(text, str(path))
    if sorted(found.models, key=_by_name) != sorted(expected, key=_by_name):
        raise Conflict(f"{path} is written in a way that cannot be changed by this command; edit it by hand")
    partial = path.with_suffix(".part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _by_name(model: Model) -> str:
    return model.name
