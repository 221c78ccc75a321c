"""
Verification: an archive is read as a whole, and must be exactly what its manifest says.

Digests show damage. They show a forgery only when the digest of the manifest comes from elsewhere: whoever can change
an archive can change its manifest too.
"""

from __future__ import annotations

import hashlib
import hmac
import zlib
from collections.abc import Iterator

from app.backup import manifest
from app.backup.archive import Archive
from app.backup.manifest import BackupManifest, FilePart, TablePart, unusable
from app.kernel.database import known_revisions

#: Bytes that are decompressed at once.
_PORTION = 1024 * 1024


def read_manifest(archive: Archive, digest: str | None = None, max_bytes: int | None = None) -> BackupManifest:
    """
    Return the manifest of an archive whose files have the declared names and sizes, and whose revision is known here.

    Raises InvalidInput, also when its SHA-256 is not `digest`.
    """
    content = archive.read(manifest.MANIFEST_FILE, manifest.MAX_MANIFEST_BYTES)
    found = hashlib.sha256(content).hexdigest()
    if digest is not None and not hmac.compare_digest(found, digest.lower()):
        raise unusable(manifest.MANIFEST_FILE, f"its SHA-256 is {found}", f"{digest}, as given")
    decoded = manifest.decode(content)
    manifest.check_revision(decoded, known_revisions())
    manifest.check_sizes(decoded, archive.sizes, max_bytes)
    return decoded


def verify(archive: Archive, of: BackupManifest) -> None:
    """Read all parts. Raises InvalidInput for the first that has another content than the manifest says."""
    for part in of.tables:
        rows = sum(portion.count(b"\n") for portion in rows_of(archive, part))
        if rows != part.rows:
            raise unusable(part.file, f"it has {rows} rows", f"{part.rows}, as the manifest says")
    for file in of.files:
        content_of(archive, file)


def rows_of(archive: Archive, part: TablePart) -> Iterator[bytes]:
    """
    Yield the rows of a table in portions of at most a megabyte.

    Raises InvalidInput when the part is damaged, is not what the manifest says, or expands beyond it.
    """
    digest, decompressor, size = hashlib.sha256(), zlib.decompressobj(31), 0
    try:
        for chunk in archive.chunks(part.file):
            digest.update(chunk)
            while chunk:
                portion = decompressor.decompress(chunk, _PORTION)
                size += len(portion)
                if size > part.bytes or decompressor.unused_data:
                    raise unusable(part.file, "it expands to more than the manifest says", f"{part.bytes} bytes")
                if portion:
                    yield portion
                chunk = decompressor.unconsumed_tail
    except zlib.error as error:
        raise unusable(part.file, f"it is damaged: {error}") from None
    if not decompressor.eof or size != part.bytes:
        raise unusable(part.file, f"it ends after {size} bytes", f"{part.bytes}, as the manifest says")
    _check(part, digest.hexdigest())


def content_of(archive: Archive, part: FilePart) -> bytes:
    """Return the content of a file. Raises InvalidInput when it is not what the manifest says."""
    content = archive.read(part.file, manifest.MAX_FILE_BYTES)
    _check(part, hashlib.sha256(content).hexdigest())
    return content


def _check(part: TablePart | FilePart, found: str) -> None:
    if found != part.sha256:
        raise unusable(part.file, f"its SHA-256 is {found}", f"{part.sha256}, as the manifest says")
