"""
Archives: the files of a backup, as a folder or in one tar file.

All files lie beside each other, under names that the manifest lists. Only plain files are read: a link, a folder, a
device, another name or a damaged header is refused, and no name of an archive is ever used as a path to write to.
A new archive appears under its name when it is complete and on disk, readable by its owner only. What exists is never
replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from app.backup.manifest import MANIFEST_FILE, unusable
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem, Unavailable
from app.kernel.ids import new_text
from app.kernel.processes import private_file

#: The ending of a destination that becomes one file.
TAR_SUFFIX = ".tar"
#: Bytes that are read at once.
CHUNK_BYTES = 256 * 1024

_BLOCK = 512
_MEMBER = re.compile(r"[a-z0-9_]{1,64}(\.[a-z]{1,8}){1,2}")
#: More files than any backup has.
_MAX_MEMBERS = 6000


class ArchiveWriter(Protocol):
    """Takes the files of a backup, one after the other."""

    def file(self, name: str) -> contextlib.AbstractContextManager[Callable[[bytes], object]]:
        """Add a file: yields the function that appends to it."""


@contextlib.contextmanager
def created(destination: Path) -> Iterator[ArchiveWriter]:
    """
    Write an archive, which appears at the end of the block; nothing is left when the block raises.

    A destination that ends in `.tar` becomes one file, another one a folder.
    Raises Conflict when the destination exists, Unavailable when it cannot be written.
    """
    destination = destination.absolute()
    if os.path.lexists(destination):
        raise Conflict(f"{destination} exists; a backup replaces nothing: choose another name")
    if not destination.parent.is_dir():
        raise InvalidInput([Problem("destination", f"there is no folder {destination.parent}")], "backup")
    partial = destination.with_name(f".{destination.name}.partial-{new_text(8, lower_case=True)}")
    try:
        if destination.name.endswith(TAR_SUFFIX):
            yield from _tar(partial)
        else:
            yield from _folder(partial)
        _publish(partial, destination)
    except OSError as error:
        raise Unavailable(f"{destination} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(partial)


def _tar(partial: Path) -> Iterator[ArchiveWriter]:
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w+b") as stream:
        yield _TarWriter(stream)
        stream.write(bytes(2 * _BLOCK))
        stream.flush()
        os.fsync(stream.fileno())


def _folder(partial: Path) -> Iterator[ArchiveWriter]:
    partial.mkdir(mode=0o700)
    yield _FolderWriter(partial)
    private_file.sync_directory(partial)


def _publish(partial: Path, destination: Path) -> None:
    """Rename the complete archive. The name is taken first, so that nothing that has appeared meanwhile is replaced."""
    try:
        if partial.is_dir():
            destination.mkdir(mode=0o700)
        else:
            os.close(os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise Conflict(f"{destination} has been created meanwhile; a backup replaces nothing") from None
    try:
        partial.rename(destination)
    except BaseException:
        _remove(destination)
        raise
    private_file.sync_directory(destination.parent)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True, slots=True)
class _FolderWriter:
    folder: Path

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Callable[[bytes], object]]:
        """Add a file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(self.folder / name, flags, 0o600), "wb") as stream:
            yield stream.write
            stream.flush()
            os.fsync(stream.fileno())


@dataclass(frozen=True, slots=True)
class _TarWriter:
    stream: BinaryIO

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Callable[[bytes], object]]:
        """Add a file. Its header is written last: the size is known then."""
        header = self.stream.tell()
        self.stream.write(bytes(_BLOCK))
        yield self.stream.write
        end = self.stream.tell()
        of = tarfile.TarInfo(name)
        of.size, of.mode = end - header - _BLOCK, 0o600
        self.stream.write(bytes(-of.size % _BLOCK))
        after = self.stream.tell()
        self.stream.seek(header)
        self.stream.write(of.tobuf(tarfile.GNU_FORMAT))
        self.stream.seek(after)


@dataclass(frozen=True, slots=True)
class Archive:
    """The files of a backup, to read."""

    path: Path
    #: Position and size of each file, in bytes; the position is 0 in a folder.
    _places: Mapping[str, tuple[int, int]]
    #: The open tar file, or the descriptor of the folder.
    _source: BinaryIO | int = field(repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all files but the manifest."""
        return {name: size for name, (_, size) in self._places.items() if name != MANIFEST_FILE}

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file. Raises InvalidInput when there is none, or it is shorter than it was."""
        if name not in self._places:
            raise unusable(name, "it is missing")
        position, left = self._places[name]
        with contextlib.ExitStack() as stack:
            if isinstance(self._source, int):
                stream = stack.enter_context(_open_in(self._source, name))
            else:
                stream = self._source
            while left > 0:
                stream.seek(position)
                chunk = stream.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise unusable(name, "it has become shorter while it was read")
                position, left = position + len(chunk), left - len(chunk)
                yield chunk

    def read(self, name: str, limit: int) -> bytes:
        """Return a whole file of at most `limit` bytes. Raises InvalidInput."""
        size = self._places.get(name, (0, 0))[1]
        if size > limit:
            raise unusable(name, f"it has {size} bytes", f"at most {limit}")
        return b"".join(self.chunks(name))


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Archive]:
    """
    Open an archive: a folder or a tar file.

    Raises NotFound when there is none, InvalidInput when anything in it is no plain file of a backup.
    """
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound("backup", str(source)) from None
    except OSError as error:
        raise Unavailable(f"{source} cannot be read: {error.strerror}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            yield Archive(source, _folder_places(descriptor), descriptor)
        elif stat.S_ISREG(mode):
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                yield Archive(source, _tar_places(stream), stream)
        else:
            raise unusable(str(source), "it is neither a folder nor a file")
    finally:
        os.close(descriptor)


def digest_of(chunks: Iterator[bytes]) -> str:
    """Return the SHA-256 of a content, in hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _folder_places(folder: int) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            _check_name(entry.name, len(found))
            with _open_in(folder, entry.name) as stream:
                found[entry.name] = (0, os.fstat(stream.fileno()).st_size)
    return found


def _open_in(folder: int, name: str) -> BinaryIO:
    """Open a plain file of a folder. Raises InvalidInput when it is anything else."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise unusable(name, f"it cannot be opened as a plain file: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise unusable(name, "it is no plain file")
    return os.fdopen(descriptor, "rb")


def _tar_places(stream: BinaryIO) -> dict[str, tuple[int, int]]:
    """Read the headers. Extended headers, which could name anything of any size, are refused: none is written."""
    end = stream.seek(0, os.SEEK_END)
    position, found = 0, dict[str, tuple[int, int]]()
    while True:
        stream.seek(position)
        header = stream.read(_BLOCK)
        if header == bytes(_BLOCK):
            return found
        try:
            member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise unusable(f"byte {position}", f"no header of a tar file: {error}") from None
        _check_name(member.name, len(found))
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise unusable(member.name, "it is no plain file")
        if member.name in found:
            raise unusable(member.name, "it is there twice")
        begin = position + _BLOCK
        if not 0 <= member.size <= end - begin:
            raise unusable(
                member.name, f"its header says {member.size} bytes", f"at most the {end - begin} that follow"
            )
        found[member.name] = (begin, member.size)
        position = begin + member.size + -member.size % _BLOCK


def _check_name(name: str, count: int) -> None:
    if not _MEMBER.fullmatch(name):
        raise unusable(ascii(name)[:100], "no file of a backup has such a name", "names as `run.copy.gz`")
    if count >= _MAX_MEMBERS:
        raise unusable("archive", f"it has more than {_MAX_MEMBERS} files")
