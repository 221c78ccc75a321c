"""Archives that nobody wrote in good faith: refused with their place, before anything is written anywhere."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.backup import archive, manifest, saving, verification
from app.kernel.database import Database
from app.kernel.errors import InvalidInput, NotFound

ROWS = b"a\t1\nb\t2\n"


def content(**changes: Any) -> dict[str, bytes]:
    """The files of a small backup that is right, with other values in its manifest."""
    packed = gzip.compress(ROWS, mtime=0)
    part = {"name": "t", "columns": ["x", "y"], "rows": 2, "bytes": len(ROWS), "stored_bytes": len(packed),
            "sha256": hashlib.sha256(packed).hexdigest()}  # fmt: skip
    made = {"format": "arriero-backup", "format_version": 1, "created_at": "2026-01-01T00:00:00Z", "arriero": "1",
            "postgres": "18", "revision": "0031", "tables": [part],
            "sequences": [], "files": [], "runs": {}}  # fmt: skip
    for name, value in changes.items():
        (part if name in part else made)[name] = value
    return {"manifest.json": json.dumps(made).encode(), "t.copy.gz": packed}


def folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for member, data in members:
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def check(source: Path, max_bytes: int | None = None, digest: str | None = None) -> None:
    with archive.opened(source) as opened:
        verification.verify(opened, verification.read_manifest(opened, digest, max_bytes))


def of_type(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def test_the_small_backup_is_right(tmp_path: Path) -> None:
    """What the other tests change is accepted as it is, in both forms."""
    check(folder(tmp_path / "f", content()))
    check(tar(tmp_path / "f.tar", [(tarfile.TarInfo(name), data) for name, data in content().items()]))
    digest = hashlib.sha256(content()["manifest.json"]).hexdigest()
    check(tmp_path / "f", digest=digest)
    with pytest.raises(InvalidInput, match="its SHA-256 is"):
        check(tmp_path / "f", digest="0" * 64)
    with pytest.raises(NotFound):
        check(tmp_path / "missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format"),
        ({"format_version": 2}, "newer version of Arriero"),
        ({"revision": "9999"}, "unknown to this version"),
        ({"revision": "../0031"}, "revision"),
        ({"name": "../t"}, "pattern"),
        ({"name": "x; DROP TABLE run"}, "pattern"),
        ({"columns": ["x", "x"]}, "twice"),
        ({"columns": ["x\") FROM PROGRAM 'id' --"]}, "pattern"),
        ({"columns": []}, "columns"),
        ({"rows": 3}, "2 rows"),
        ({"rows": -1}, "rows"),
        ({"rows": "2"}, "rows"),
        ({"bytes": 7}, "expands to more"),
        ({"bytes": 9}, "ends after 8"),
        ({"bytes": 10**15}, "when decompressed"),
        ({"stored_bytes": 1}, "as the manifest says"),
        ({"sha256": "0" * 64}, "its SHA-256"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"files": [{"name": "../../etc/passwd", "stored_bytes": 1, "sha256": "0" * 64}]}, "files"),
        ({"files": [{"name": "settings.json", "stored_bytes": 10**12, "sha256": "0" * 64}]}, "files"),
        ({"runs": {"x" * 1000: 1}}, "runs"),
        ({"more": 1}, "more"),
    ],
)
def test_a_manifest_that_is_not_of_its_form_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check(folder(tmp_path / "f", content(**changes)))


def test_no_json_at_all_and_too_much_of_it(tmp_path: Path) -> None:
    for number, data in enumerate(
        (b"", b"[" * 100_000, b'{"format":', b"\xff", b" " * (manifest.MAX_MANIFEST_BYTES + 1))
    ):
        with pytest.raises(InvalidInput):
            check(folder(tmp_path / str(number), content() | {"manifest.json": data}))
    with pytest.raises(InvalidInput, match=r"manifest\.json: it is missing"):
        check(folder(tmp_path / "none", {"t.copy.gz": b""}))


def test_a_part_that_is_damaged_or_is_a_bomb_is_refused(tmp_path: Path) -> None:
    """Ten gigabytes in ten megabytes: not more than the declared bytes are ever decompressed."""
    for number, packed in enumerate(
        (
            gzip.compress(ROWS, mtime=0)[:-5],
            gzip.compress(ROWS, mtime=0) + b"x",
            gzip.compress(ROWS, mtime=0) + gzip.compress(ROWS, mtime=0),
            b"no gzip",
            b"",
            gzip.compress(bytes(50_000_000)),
        )
    ):
        files = content(stored_bytes=len(packed), sha256=hashlib.sha256(packed).hexdigest())
        with pytest.raises(InvalidInput, match=r"t\.copy\.gz"):
            check(folder(tmp_path / str(number), files | {"t.copy.gz": packed}))


def test_a_limit_for_what_is_decompressed_can_be_given(tmp_path: Path) -> None:
    source = folder(tmp_path / "f", content())
    check(source, max_bytes=len(ROWS))
    with pytest.raises(InvalidInput, match="--max-bytes"):
        check(source, max_bytes=len(ROWS) - 1)


def test_files_that_the_manifest_does_not_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not name it"):
        check(folder(tmp_path / "more", content() | {"u.copy.gz": b""}))
    missing = content()
    del missing["t.copy.gz"]
    with pytest.raises(InvalidInput, match="it is missing"):
        check(folder(tmp_path / "less", missing))


def test_links_folders_and_devices_in_a_folder_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(content()["t.copy.gz"])
    makers: list[Callable[[Path], object]] = [
        lambda path: path.symlink_to(secret), Path.mkdir, lambda path: os.mkfifo(path),
    ]  # fmt: skip
    for number, make in enumerate(makers):
        source = folder(tmp_path / str(number), content())
        (source / "t.copy.gz").unlink()
        make(source / "t.copy.gz")
        with pytest.raises(InvalidInput, match=r"t\.copy\.gz"):
            check(source)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (of_type("t.copy.gz", tarfile.SYMTYPE, "/etc/passwd"), "no plain file"),
        (of_type("t.copy.gz", tarfile.LNKTYPE, "manifest.json"), "no plain file"),
        (of_type("t.copy.gz", tarfile.CHRTYPE), "no plain file"),
        (of_type("t.copy.gz", tarfile.DIRTYPE), "no plain file|no file of a backup"),
        (of_type("../t.copy.gz", tarfile.REGTYPE), "such a name"),
        (of_type("/t.copy.gz", tarfile.REGTYPE), "such a name"),
        (of_type("a/t.copy.gz", tarfile.REGTYPE), "such a name"),
        (of_type("T.copy.gz", tarfile.REGTYPE), "such a name"),
        (of_type("x" * 5000, tarfile.REGTYPE), "such a name|no plain file"),
        (of_type("manifest.json", tarfile.REGTYPE), "twice"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_tar_file_are_plain_files_with_plain_names(
    tmp_path: Path, member: tarfile.TarInfo, message: str, form: int
) -> None:
    files = content()
    source = tar(
        tmp_path / "f.tar",
        [
            (tarfile.TarInfo("manifest.json"), files["manifest.json"]),
            (member, files["t.copy.gz"] if member.type == tarfile.REGTYPE else b""),
        ],
        form,
    )
    with pytest.raises(InvalidInput, match=message):
        check(source)


def test_a_damaged_tar_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    source = tar(tmp_path / "f.tar", [(tarfile.TarInfo(name), data) for name, data in content().items()])
    whole = source.read_bytes()
    for end in (0, 100, 512, 700, 1100, 1600):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        with pytest.raises(InvalidInput):
            check(tmp_path / "cut.tar")
    huge = bytearray(whole)
    huge[124:136] = b"\x80" + (2**80).to_bytes(11, "big")
    (tmp_path / "huge.tar").write_bytes(huge)
    with pytest.raises(InvalidInput):
        check(tmp_path / "huge.tar")


def test_any_changed_byte_of_a_real_backup_is_found(database: Database, tmp_path: Path) -> None:
    """In both forms, a byte in the middle of each file."""
    saving.save(database, tmp_path / "b", tmp_path, {"a": 1})
    check(tmp_path / "b")
    for file in [*sorted((tmp_path / "b").iterdir())[:10], tmp_path / "b" / "settings.json"]:
        if file.name == "manifest.json":
            continue
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(tmp_path / "b", tmp_path / "c")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "c" / file.name).write_bytes(data)
        with pytest.raises(InvalidInput):
            check(tmp_path / "c")
