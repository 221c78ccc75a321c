"""
The manifest of a backup: what is in it, of which versions, and how each part is recognised.

A backup holds data and nothing that is executed: rows as text, values of sequences, and two files. The tables that take
the rows are made by the migrations of this program.
Whatever is not of the declared form is refused with its place, before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from app.kernel.errors import InvalidInput, Problem

#: The name of the manifest's file, and the most bytes of it.
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
#: The files of a data directory that are part of a backup: the catalogue of the data directory.
CATALOG_FILE = "catalog.toml"
#: The settings that were not defaults, without secrets. They are shown by a restore, and not applied.
SETTINGS_FILE = "settings.json"
#: Most bytes of such a file.
MAX_FILE_BYTES = 16 * 1024 * 1024
#: The extension of the parts with rows: the text format of Postgres's COPY, compressed by gzip.
TABLE_SUFFIX = ".copy.gz"
#: A backup that takes up to so many bytes is never a bomb; a larger one may expand by this factor.
ALWAYS_ACCEPTED_BYTES = 1024**3
MAX_EXPANSION = 100

#: The format that this program writes and reads.
FORMAT_VERSION = 1

_Name = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,62}$")]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, lt=2**62)]
_Text = Annotated[str, StringConstraints(max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TablePart(_Strict):
    """The rows of one table."""

    name: _Name
    #: The columns of a row, in order.
    columns: Annotated[tuple[_Name, ...], Field(min_length=1, max_length=1000)]
    rows: _Count
    #: Bytes of the rows as text, and of the compressed file.
    bytes: _Count
    stored_bytes: _Count
    #: SHA-256 of the compressed file.
    sha256: _Digest

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}{TABLE_SUFFIX}"


class FilePart(_Strict):
    """A file that is stored as it is."""

    name: Literal["catalog.toml", "settings.json"]
    stored_bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: _Digest

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.name


class SequenceValue(_Strict):
    """The state of a sequence."""

    name: _Name
    last_value: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    is_called: bool


class BackupManifest(_Strict):
    """What a backup holds."""

    format: Literal["arriero-backup"] = "arriero-backup"
    format_version: Annotated[int, Field(ge=1, lt=2**31)] = FORMAT_VERSION
    #: The instant of the snapshot, by the clock of the database.
    created_at: AwareDatetime
    #: The versions of Arriero and of Postgres, and the revision of the schema.
    arriero: _Text
    postgres: _Text
    revision: Annotated[str, StringConstraints(pattern=r"^[0-9a-z_]{1,32}$")]
    tables: Annotated[tuple[TablePart, ...], Field(max_length=5000)]
    sequences: Annotated[tuple[SequenceValue, ...], Field(max_length=5000)]
    files: Annotated[tuple[FilePart, ...], Field(max_length=2)]
    #: Runs by state.
    runs: Annotated[dict[_Text, _Count], Field(max_length=100)]

    @property
    def parts(self) -> tuple[TablePart | FilePart, ...]:
        """All parts."""
        return (*self.tables, *self.files)

    @property
    def rows(self) -> int:
        """The rows of all tables."""
        return sum(part.rows for part in self.tables)

    @property
    def bytes(self) -> int:
        """Bytes of the rows as text."""
        return sum(part.bytes for part in self.tables)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts as they are stored."""
        return sum(part.stored_bytes for part in self.parts)


def encode(manifest: BackupManifest) -> bytes:
    """Return the manifest as it is stored."""
    return manifest.model_dump_json(indent=1).encode() + b"\n"


def decode(content: bytes) -> BackupManifest:
    """
    Return the manifest.

    Raises InvalidInput with each problem, also where names are used twice.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        raise unusable(MANIFEST_FILE, f"{len(content)} bytes are too many", f"at most {MAX_MANIFEST_BYTES}")
    try:
        manifest = BackupManifest.model_validate_json(content)
    except ValidationError as error:
        problems = [
            Problem(".".join([MANIFEST_FILE, *map(str, item["loc"])]), str(item["msg"])[:200])
            for item in error.errors(include_url=False, include_input=False)[:20]
        ]
        raise InvalidInput(problems, "backup") from None
    if manifest.format_version > FORMAT_VERSION:
        raise unusable(
            f"{MANIFEST_FILE}.format_version",
            f"{manifest.format_version} was written by a newer version of Arriero ({manifest.arriero})",
            f"at most {FORMAT_VERSION}",
        )
    for kind, names in (
        ("tables", [part.name for part in manifest.tables]),
        ("files", [part.file for part in manifest.files]),
        ("sequences", [one.name for one in manifest.sequences]),
    ):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise unusable(f"{MANIFEST_FILE}.{kind}", f"{', '.join(twice)} is there twice")
    for part in manifest.tables:
        if len(set(part.columns)) != len(part.columns):
            raise unusable(f"{MANIFEST_FILE}.tables", f"a column of {part.name} is there twice")
    return manifest


def check_revision(manifest: BackupManifest, known: Collection[str]) -> None:
    """Raise InvalidInput unless this program has the migrations of the backup's schema."""
    if manifest.revision not in known:
        raise unusable(
            f"{MANIFEST_FILE}.revision",
            f"{manifest.revision} is unknown to this version; the backup is of Arriero {manifest.arriero}",
            "backups of this version and of earlier ones",
        )


def check_sizes(manifest: BackupManifest, stored: Mapping[str, int], max_bytes: int | None) -> None:
    """
    Raise InvalidInput unless the files are the declared ones in names and sizes, and expand to an accepted size.

    `stored` are the sizes of the files of the archive, in bytes, without the manifest. `max_bytes` limits the rows as
    text; without it, they may be `MAX_EXPANSION` times as large as their files.
    """
    expected = {part.file: part.stored_bytes for part in manifest.parts}
    problems = [Problem(name, "the manifest does not name it") for name in sorted(stored.keys() - expected.keys())]
    problems += [Problem(name, "it is missing") for name in sorted(expected.keys() - stored.keys())]
    problems += [
        Problem(name, f"it has {stored[name]} bytes", f"{size}, as the manifest says")
        for name, size in expected.items()
        if stored.get(name, size) != size
    ]
    if problems:
        raise InvalidInput(problems[:20], "backup")
    limit = max(ALWAYS_ACCEPTED_BYTES, MAX_EXPANSION * manifest.stored_bytes) if max_bytes is None else max_bytes
    if manifest.bytes > limit:
        raise unusable(
            "tables", f"they take {manifest.bytes} bytes when decompressed", f"at most {limit} (--max-bytes)"
        )


def check_columns(manifest: BackupManifest, schema: Mapping[str, Collection[str]]) -> None:
    """
    Raise InvalidInput unless the backup has each table of the schema with all its columns, and nothing else.

    `schema` are the columns by table, at the revision of the backup.
    """
    found = {part.name: set(part.columns) for part in manifest.tables}
    problems = [
        Problem(name, "the schema has no such table or column", f"the tables of revision {manifest.revision}")
        for name, columns in sorted(found.items())
        if not columns <= set(schema.get(name, ()))
    ]
    problems += [
        Problem(name, "its rows, or some of its columns, are not in the backup")
        for name, columns in sorted(schema.items())
        if found.get(name) != set(columns) and name not in {problem.where for problem in problems}
    ]
    if problems:
        raise InvalidInput(problems[:20], "backup")


def unusable(where: str, message: str, accepted: str = "") -> InvalidInput:
    """Return the refusal of a backup."""
    return InvalidInput([Problem(where, message, accepted)], "backup")
