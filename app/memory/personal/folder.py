"""
The watched folder: its files, `<namespace>/<user>/<kind>/<name>.md` or `.json`.

The folder `_` stands for the documents of the whole namespace. A user whose name is no file name is written with
percent encoding (`a%2Fb`). Hidden files and backups of editors are passed over.
Nothing outside of the folder is read: symbolic links are refused at each level, and only regular files are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from app.access import namespaces
from app.kernel.errors import ArrieroError, InvalidInput, Problem
from app.kernel.security.texts import printable
from app.memory.personal.document import ContextFormat, ContextKind, name_problems, user_problems
from app.memory.personal.storage import ContextOwner

#: The folder of the documents of the whole namespace.
SHARED = "_"
#: The endings of files, and how such files are written.
FORMATS = {".md": ContextFormat.MARKDOWN, ".markdown": ContextFormat.MARKDOWN, ".json": ContextFormat.JSON}
#: Levels below the folder: namespace, user, kind, file.
_LEVELS = 4
#: Folders that are read for each file that may be read.
_FOLDERS_PER_FILE = 3
#: Entries of one folder that are looked at for each file that may be read.
_ENTRIES_PER_FILE = 3


class FolderUnreadable(ArrieroError):
    """The watched folder, or a file of it, cannot be read."""


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file, as it was listed."""

    #: Its path in the folder.
    path: str
    size: int
    mtime_ns: int
    #: Why it is not read; empty when it is.
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FilePlace:
    """Which document a file is."""

    owner: ContextOwner
    kind: ContextKind
    name: str
    format: ContextFormat


@dataclass(frozen=True, slots=True)
class FolderListing:
    """The files of the folder, by path."""

    files: tuple[FolderFile, ...]
    #: There are more files than are read.
    is_cut: bool


def listing(folder: Path, max_files: int) -> FolderListing:
    """Return the files of the folder, at most so many. Raises FolderUnreadable."""
    found: list[FolderFile] = []
    opened = 0

    def walk(fd: int, prefix: str, level: int) -> bool:
        """Add the files of a folder; False when there are too many."""
        nonlocal opened
        with os.scandir(fd) as entries:
            most = islice(entries, _ENTRIES_PER_FILE * max_files)
            names = sorted(entry.name for entry in most if not _is_passed_over(entry.name))
            whole = next(entries, None) is None
        for name in names:
            if len(found) >= max_files or opened >= _FOLDERS_PER_FILE * max_files:
                return False
            path = f"{prefix}{name}"
            try:
                state = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISDIR(state.st_mode) and level < _LEVELS:
                    opened += 1
                    with _opened(name, fd, os.O_DIRECTORY) as inner:
                        if not walk(inner, f"{path}/", level + 1):
                            return False
                else:
                    found.append(_file(path, state, level))
            except FileNotFoundError:
                continue  # it was removed meanwhile
            except OSError as error:
                found.append(FolderFile(path, 0, 0, f"it cannot be read: {error.strerror}"))
        return whole

    try:
        with _opened(str(folder), None, os.O_DIRECTORY, follow=True) as root:
            whole = walk(root, "", 1)
    except OSError as error:
        raise FolderUnreadable(f"{folder} cannot be read: {error.strerror}") from None
    return FolderListing(tuple(found), not whole)


def place_of(path: str) -> FilePlace:
    """Return which document a file is. Raises InvalidInput when its path is that of none."""
    namespace, folder, kind, filename = path.split("/")
    # Bytes that are no UTF-8 become a character that no name of a user needs.
    user = None if folder == SHARED else unquote(folder)
    name, dot, ending = filename.rpartition(".")
    format_ = FORMATS.get(f"{dot}{ending}".lower())
    problems = [] if user is None else user_problems(user)
    if not namespaces.is_valid(namespace):
        problems.append(Problem("namespace", f"{namespace!r} is no name of a namespace", namespaces.ACCEPTED))
    if kind not in {one.value for one in ContextKind}:
        problems.append(Problem("kind", f"{kind!r} is no kind of documents", ", ".join(ContextKind)))
    if format_ is None:
        problems.append(Problem("name", f"{filename!r} is neither Markdown nor JSON", ", ".join(FORMATS)))
    else:
        problems += name_problems(name)
    if problems or format_ is None:
        raise InvalidInput(problems, "file")
    return FilePlace(ContextOwner(namespace, user), ContextKind(kind), name, format_)


def read(folder: Path, path: str, max_bytes: int) -> bytes:
    """Return the content of a file. Raises FolderUnreadable, also when it is longer, or not a regular file."""
    try:
        with _opened(str(folder), None, os.O_DIRECTORY, follow=True) as root:
            return _read(root, path.split("/"), max_bytes)
    except OSError as error:
        raise FolderUnreadable(f"it cannot be read: {error.strerror}") from None


def exists(folder: Path, path: str) -> bool:
    """
    Whether there is something at a path of the folder, or may be where nobody can look.

    Raises FolderUnreadable when the folder is not there.
    """
    if not folder.is_dir():
        raise FolderUnreadable(f"{folder} is no folder")
    try:
        (folder / path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _read(fd: int, names: list[str], max_bytes: int) -> bytes:
    if len(names) > 1:
        with _opened(names[0], fd, os.O_DIRECTORY) as inner:
            return _read(inner, names[1:], max_bytes)
    with _opened(names[0], fd, os.O_NONBLOCK) as file:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise FolderUnreadable("it is no regular file")
        content = b""
        while part := os.read(file, max_bytes + 1 - len(content)):
            content += part
        if len(content) > max_bytes:
            raise FolderUnreadable(f"it has more than {max_bytes} bytes (setting context.max_document_bytes)")
        return content


def _file(path: str, state: os.stat_result, level: int) -> FolderFile:
    problem = ""
    if stat.S_ISLNK(state.st_mode):
        problem = "it is a symbolic link, and those are not followed"
    elif level != _LEVELS:
        problem = "it is in the wrong place; accepted: <namespace>/<user>/<kind>/<name>.md or .json"
    elif not stat.S_ISREG(state.st_mode):
        problem = "it is no regular file" if not stat.S_ISDIR(state.st_mode) else "it is a folder in a folder of files"
    return FolderFile(path, state.st_size, state.st_mtime_ns, problem)


@contextmanager
def _opened(name: str, fd: int | None, flags: int, *, follow: bool = False) -> Iterator[int]:
    opened = os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags | (0 if follow else os.O_NOFOLLOW), dir_fd=fd)
    try:
        yield opened
    finally:
        os.close(opened)


def _is_passed_over(name: str) -> bool:
    # A name that cannot be stored is that of no document either.
    return name.startswith((".", "#")) or name.endswith("~") or printable(name) != name
