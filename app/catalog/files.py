"""
Model files: where each one is stored on this host, and how it is installed.

`locate` only checks the disk and is fast; its error names the command that installs a missing file.
`pull` installs a file from a URL, from the Hugging Face hub, or from installed Python packages (chunks, a checkpoint).
The path of a downloaded file is derived from its source: entries with the same source share the file, and an entry
whose revision changes never uses the old file.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import SecretStr

from app.catalog import catalog, download, header, install, packages
from app.catalog.catalog import Catalog
from app.catalog.download import Download
from app.catalog.engine_options import EngineEntry, SourcedAdapter
from app.catalog.install import FileProgress, FreeSpace, InstallState, OnProgress
from app.catalog.model import Model
from app.catalog.source import (
    ConvertedSource,
    FileSource,
    HubSource,
    ModelSource,
    PackageFile,
    PackageSource,
    ServerSource,
    UrlSource,
    split_parts,
)
from app.kernel import shipped
from app.kernel.errors import (
    DownloadFailed,
    InvalidCatalog,
    ModelFileDamaged,
    ModelFileMissing,
    ModelFileUnusable,
    Problem,
)
from app.kernel.settings import Settings

#: The Hugging Face hub. A mirror has the same URL paths.
HUB = "https://huggingface.co"
#: Results of header checks by path: the version of the file that was checked, and why it cannot be served.
_HEADER_CHECKS: dict[Path, tuple[tuple[tuple[int, ...], ...], ModelFileUnusable | None]] = {}
#: Maximum remembered results, and maximum parts of a split file that its version covers.
_MAX_HEADER_CHECKS, _MAX_CHECKED_PARTS = 1_000, 1_000
#: Folder of downloaded models in the data directory.
FOLDER = "models"
#: The folder of the stored KV states, in the data directory.
STATES_FOLDER = "kv"
#: Name of the catalogue of a data directory.
OWN_CATALOG = "catalog.toml"


def shipped_catalog() -> Path:
    """Returns the path of the catalogue that is part of Arriero."""
    return shipped.folder("models") / "catalog.toml"


def read_catalog(files: Sequence[Path] = ()) -> Catalog:
    """
    Reads the shipped catalogue and merges those of `files` (the setting `catalog.files`) into it.

    Raises InvalidCatalog when a file is missing, cannot be read or has an invalid entry.
    """
    return catalog.merge(read_file(path) for path in (shipped_catalog(), *(path.expanduser() for path in files)))


def own_catalog(data_dir: Path) -> Path:
    """Returns the path of the catalogue of a data directory, to which `arriero models pull` adds entries."""
    return data_dir / OWN_CATALOG


def catalog_of(settings: Settings) -> Catalog:
    """
    Reads the catalogues of an installation: the shipped one, those of `catalog.files`, that of the data directory.

    Raises what `read_catalog` raises.
    """
    own = own_catalog(settings.data_dir)
    return read_catalog((*settings.catalog.files, *([own] if own.exists() else ())))


def file_paths(model: Model, data_dir: Path) -> tuple[Path, ...]:
    """
    Returns the paths of all parts of the model's file, whether they are installed or not.

    Raises ModelFileMissing when the path depends on a Python package that is not installed.
    """
    source = model.source
    match source:
        case FileSource():
            first = Path(source.path).expanduser()
            return tuple(first.with_name(name) for name in source.parts)
        case PackageSource(chunks=()):
            return tuple(
                packages.path_of(model, PackageFile(package=source.package, file=file)) for file in source.parts
            )
        case ConvertedSource():
            version = packages.version(model, source.convert)
            folder = data_dir / FOLDER / "package" / f"{source.convert}-{version}"
        case PackageSource():
            folder = data_dir / FOLDER / "package" / f"{source.package}-{packages.version(model, source.package)}"
        case UrlSource():
            digest = hashlib.sha256(source.url.encode()).hexdigest()[:12]
            host = (urlsplit(source.url).netloc or "file").replace(":", "_")
            folder = data_dir / FOLDER / "url" / host / digest
        case HubSource():
            folder = data_dir / FOLDER / "hf" / source.hf / source.revision
        case ServerSource():
            raise ModelFileMissing(f"{model.name} has no file: it is served by the {source.label}")
    return tuple(folder / part for part in source.parts)


def locate(model: Model, data_dir: Path) -> Path:
    """
    Returns the file that llama.cpp loads; of a split model this is the first part.

    All parts, and the files of its adapters, projector and draft model must exist. Contents are not read.

    Raises ModelFileMissing with the command that installs the file, and ModelFileDamaged when the size of a file is not
    that of the catalogue.
    """
    for other in companions(model):
        locate(other, data_dir)
    paths = file_paths(model, data_dir)
    missing = [path for path in paths if not _exists(model, path)]
    if missing:
        raise ModelFileMissing(_missing(model, missing, len(paths)))
    for path, size in zip(paths, model.source.size, strict=False):
        if (found := path.stat().st_size) != size:
            reason = f"it has {found:,} bytes, the catalogue says {size:,}"
            raise ModelFileDamaged(path, f"{reason}; {model.source.replacement(model.name)}")
    return paths[0]


def _exists(model: Model, path: Path) -> bool:
    """Returns whether there is something at the path. Raises ModelFileDamaged when that is not known."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        advice = model.source.replacement(model.name)
        raise ModelFileDamaged(path, f"it cannot be accessed: {reason or error}; {advice}") from error
    return True


def check(model: Model, data_dir: Path) -> Path:
    """
    Returns the same file as `locate`, after its header and those of its companions were validated.

    A file that has not changed since the last check is not read again.

    Raises what `locate` raises, and ModelFileUnusable with the reason for a file that cannot be served.
    """
    path = locate(model, data_dir)
    for first in (path, *(locate(other, data_dir) for other in companions(model))):
        try:
            _check_header(first, file_version(first))
        except ModelFileDamaged as error:
            raise ModelFileDamaged(error.path, f"{error.reason}; {model.source.replacement(model.name)}") from None
    return path


def file_version(first: Path) -> tuple[tuple[int, ...], ...]:
    """Returns a value that differs when the file, or one of its parts, was changed."""
    paths = [first.parent / name for name in split_parts(first.name)[:_MAX_CHECKED_PARTS]]
    seen = [path.stat() for path in paths if path.exists()]
    return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in seen)


def changed_at(first: Path) -> float:
    """Returns the instant, in seconds since the epoch, at which the file or one of its parts was last changed."""
    return max(ctime for *_, ctime in file_version(first)) / 1e9


def _check_header(first: Path, version: tuple[tuple[int, ...], ...]) -> None:
    known = _HEADER_CHECKS.get(first)
    if known is None or known[0] != version:
        error = None
        try:
            header.read(first)
        except ModelFileUnusable as found:
            error = found
        if len(_HEADER_CHECKS) >= _MAX_HEADER_CHECKS:
            _HEADER_CHECKS.clear()
        known = _HEADER_CHECKS[first] = (version, error)
    if known[1] is not None:
        raise known[1].with_traceback(None)


def state_folder(model: Model, data_dir: Path) -> Path:
    """Returns the folder of the stored states of a model, which need not exist."""
    return data_dir / STATES_FOLDER / model.slug


def locate_adapter(model: Model, adapter: SourcedAdapter, data_dir: Path) -> Path:
    """Returns the file of an adapter of the model. Raises what `locate` raises."""
    return locate(_companion(model, adapter.source), data_dir)


def locate_projector(model: Model, data_dir: Path) -> Path | None:
    """Returns the file of the model's projector, or None when it has none. Raises what `locate` raises."""
    return None if (projector := model.mmproj) is None else locate(_companion(model, projector.source), data_dir)


def locate_draft(model: Model, data_dir: Path) -> Path | None:
    """Returns the file of the model's draft model, or None when it has none. Raises what `locate` raises."""
    return None if (draft := model.engine.draft) is None else locate(_companion(model, draft.source), data_dir)


def companions(model: Model) -> list[Model]:
    """Returns the model with the source of each further file: of its adapters, its projector and its draft model."""
    given = (*model.engine.loras, model.mmproj, model.engine.draft)
    return [_companion(model, one.source) for one in given if one is not None]


def pull(
    model: Model,
    data_dir: Path,
    report: OnProgress = lambda _: None,
    *,
    token: SecretStr | None = None,
    hub: str = HUB,
    again: bool = False,
    free_space: FreeSpace = install.free_bytes,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """
    Installs the model's file and those of its companions on this host, and verifies their size, hash and header.

    Files that are already installed are not downloaded, unless `again` is set. `token` is sent only to the hub.

    Raises DownloadFailed, ModelFileMissing for a file that cannot be downloaded, and ModelFileDamaged for an installed
    file that is broken.
    """
    for other in companions(model):
        pull(other, data_dir, report, token=token, hub=hub, again=again, free_space=free_space, sleep=sleep)
    source = model.source
    paths = file_paths(model, data_dir)
    try:
        match source:
            case UrlSource() | HubSource():
                _ensure_space(source, paths, free_space)
                for index, path in enumerate(paths):
                    wanted = Download(
                        url=_download_url(source, hub, index),
                        target=path,
                        size=source.size[index] if source.size else None,
                        sha256=source.sha256[index] if source.sha256 else None,
                        token=token if isinstance(source, HubSource) else None,
                        page=f"{hub.rstrip('/')}/{source.hf}" if isinstance(source, HubSource) else "",
                    )
                    if not again and _is_complete(wanted, report):
                        continue
                    with install.lock(path, report):
                        if again or not _is_complete(wanted, report):
                            download.fetch(wanted, report, free_space=free_space, sleep=sleep)
            case PackageSource(chunks=chunks) if chunks:
                wanted = _package_download(source.package, source, paths[0])
                if again or not _is_complete(wanted, report):
                    with install.lock(paths[0], report):
                        if again or not _is_complete(wanted, report):
                            packages.assemble(model, source, paths[0], report, free_space)
            case ConvertedSource():
                wanted = _package_download(source.convert, source, paths[0])
                if again or not _is_complete(wanted, report):
                    with install.lock(paths[0], report):
                        if again or not _is_complete(wanted, report):
                            packages.convert(model, source, paths[0], report, free_space)
            case _:
                locate(model, data_dir)
                for index, path in enumerate(paths):
                    _verify(path, source.sha256[index] if source.sha256 else None, report)
    except OSError as error:
        raise DownloadFailed(f"{model.name}: {error.filename or data_dir}: {error.strerror or error}") from error
    path = locate(model, data_dir)
    header.read(path)
    return path


def verify(model: Model, data_dir: Path, report: OnProgress = lambda _: None) -> bool:
    """
    Reads the model's file completely, and compares its hash with that of the catalogue or of its installation.

    Returns False when no hash is known: then only the header was checked. Raises what `check` raises, and
    ModelFileDamaged for a file whose content has changed.
    """
    check(model, data_dir)
    compared = True
    for index, path in enumerate(file_paths(model, data_dir)):
        record = install.find_record(path)
        wanted = model.source.sha256[index] if model.source.sha256 else record.sha256 if record else None
        if wanted is None:
            compared = False
        elif (found := _hash(path, report)) != wanted:
            says = "the catalogue says" if model.source.sha256 else "when it was installed, it was"
            advice = model.source.replacement(model.name)
            raise ModelFileDamaged(path, f"its sha256 is {found}, {says} {wanted}; {advice}")
        report(FileProgress(path.name, InstallState.DONE, path.stat().st_size, path.stat().st_size))
    return compared


def _ensure_space(source: UrlSource | HubSource, paths: Sequence[Path], free_space: FreeSpace) -> None:
    """Raises DownloadFailed when the parts that are not here do not fit the disk together."""
    partial = [install.partial_path(path) for path in paths]
    here = [path.stat().st_size if path.exists() else 0 for path in partial]
    needed = [size - done for size, done, path in zip(source.size, here, paths, strict=False) if not path.exists()]
    if len(needed) > 1:
        folder = paths[0].parent
        folder.mkdir(parents=True, exist_ok=True)
        install.ensure_free_space(folder, sum(needed), free_space, f"{paths[0].name} with its other parts")


def _companion(model: Model, source: ModelSource) -> Model:
    """Returns the model with another source: its further files are installed and located like models."""
    return model.model_copy(update={"source": source, "engine": EngineEntry(), "mmproj": None})


def can_pull(model: Model) -> bool:
    """Returns whether `pull` can install the file: from a URL, the hub, or installed packages."""
    source = model.source
    if isinstance(source, PackageSource):
        needed = {source.package, *(chunk.package for chunk in source.chunks)}
        return bool(source.chunks) and all(packages.is_installed(package) for package in needed)
    if isinstance(source, ConvertedSource):
        return packages.is_installed(source.convert)
    return isinstance(source, UrlSource | HubSource)


def read_file(path: Path) -> Catalog:
    """Reads one catalogue. Raises InvalidCatalog."""
    try:
        # Reading a pipe can block for an unlimited time, and a device may have no end.
        if path.is_file() or path.is_dir() or not path.exists():
            return catalog.parse(path.read_text(encoding="utf-8"), str(path))
        reason = "this is not a regular file"
    except FileNotFoundError:
        reason = "there is no such file"
    except IsADirectoryError:
        reason = "this is a folder"
    except UnicodeDecodeError as error:
        reason = f"this is not UTF-8 text (byte {error.start})"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
    raise InvalidCatalog([Problem(str(path), reason, "the path of a TOML file (setting catalog.files)")])


def _missing(model: Model, missing: Sequence[Path], count: int) -> str:
    names = ", ".join(path.name for path in missing[1:4]) + (" …" if len(missing) > 4 else "")
    more = f", nor {names}" if names else ""
    what = f"{model.name}: there is no file {missing[0]}{more}" + (f" (of {count} parts)" if count > 1 else "")
    if can_pull(model):
        return f"{what}; run `arriero models pull {model.name}`"
    if isinstance(model.source, PackageSource):  # it is installed, and lacks the file
        return f"{what}; {model.source.replacement(model.name)}"
    if isinstance(model.source, FileSource):
        return f"{what}; put it there, or correct `path` in its entry of the catalogue"
    return f"{what}; {model.source.installation(model.name)}"


def _download_url(source: UrlSource | HubSource, hub: str, index: int) -> str:
    if isinstance(source, HubSource):
        return f"{hub.rstrip('/')}/{source.hf}/resolve/{quote(source.revision, safe='')}/{quote(source.parts[index])}"
    if index == 0:
        return source.url
    parts = urlsplit(source.url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(source.parts[index])}"))


def _is_complete(wanted: Download, report: OnProgress) -> bool:
    """Returns whether the file is installed, and has the size, hash and header that are expected."""
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
    size = target.stat().st_size
    report(FileProgress(target.name, InstallState.DONE, size, size, "already installed"))
    return True


def _verify(path: Path, sha256: str | None, report: OnProgress) -> None:
    header.check(path)
    if sha256 is not None and (found := _hash(path, report)) != sha256:
        raise ModelFileDamaged(path, f"its sha256 is {found}, the catalogue says {sha256}")
    size = path.stat().st_size
    report(FileProgress(path.name, InstallState.DONE, size, size, "already installed"))


def _hash(path: Path, report: OnProgress) -> str:
    size = path.stat().st_size
    report(FileProgress(path.name, InstallState.VERIFYING, 0, size))
    return install.sha256_of(path).hexdigest()


def _package_download(package: str, source: PackageSource | ConvertedSource, target: Path) -> Download:
    size, sha256 = (source.size or (None,))[0], (source.sha256 or (None,))[0]
    return Download(url=f"package:{package}", target=target, size=size, sha256=sha256)
