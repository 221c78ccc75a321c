"""`arriero backup` and `arriero restore`: an installation in one archive, and an installation of an archive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.markup import escape
from typer.core import TyperGroup

from app.backup import archive, restoring, saving, verification
from app.backup.manifest import BackupManifest
from app.catalog import files as catalog_files
from app.cli import auditing
from app.cli.output import AsJson, console, notes, print_json, settings_of
from app.kernel import addresses, clock, embedded
from app.kernel.database import Database
from app.kernel.errors import InvalidInput, InvalidSettings, ModelFileUnusable, Problem
from app.kernel.processes.data_directory import DataDirectory
from app.kernel.settings import Loaded, Settings, shown, values_of
from app.kernel.units import sizes


class _WithDefault(TyperGroup):
    """`arriero backup DEST` is `arriero backup create DEST`."""

    default = "create"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_WithDefault,
    no_args_is_help=True,
    help="Save the database and the catalogue to one place, while everything runs; verify backups.\n\n"
    "`arriero backup DEST` makes a backup, in a folder or a tar file; `arriero restore` makes an installation of it.",
)

_Source = Annotated[Path, typer.Argument(help="A backup: a folder or a tar file.")]
_Digest = Annotated[
    str | None,
    typer.Option("--digest", metavar="SHA256", help="Refuse a backup whose manifest has another SHA-256."),
]
_MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="SIZE", help="Accept so many bytes of rows when decompressed, such as 500GB."),
]


@app.command(_WithDefault.default)
def create(
    context: typer.Context,
    destination: Annotated[Path, typer.Argument(help="A name that does not exist; with .tar at its end, one file.")],
    as_json: AsJson = False,
) -> None:
    """
    Save the database and the catalogue of the data directory as they are at one instant, while everything runs.

    Secrets and files of models are not part of it. It is readable by you only, and holds all texts of users.
    """
    loaded: Loaded = context.obj
    settings = loaded.settings
    with _database(settings, existing=True) as database:
        saved = saving.save(database, destination, settings.data_dir, _own_settings(loaded), _shown_progress())
        target = {"digest": saved.digest}
        auditing.note(database, "arriero backup", target, {"rows": saved.manifest.rows, "path": str(saved.path)})
    if as_json:
        print_json({"path": str(saved.path), "digest": saved.digest, **_summary(saved.manifest)})
        return
    console().print(f"{escape(str(saved.path))}: {_description(saved.manifest)}")
    console().print(f"SHA-256 of its manifest: {saved.digest}")
    notes().print(
        "not in it: secrets (database and broker addresses, API keys of clients, TLS keys, secrets of steps) and files "
        "of models; keep the secrets apart (docs/backup.md)",
        style="dim",
    )


@app.command()
def verify(source: _Source, digest: _Digest = None, max_bytes: _MaxBytes = None, as_json: AsJson = False) -> None:
    """Read a backup as a whole, and say whether it is complete and this version can restore it. Exits with 2 if not."""
    with archive.opened(source) as opened:
        of = verification.read_manifest(opened, digest, _bytes(max_bytes))
        verification.verify(opened, of)
    if as_json:
        print_json({"path": str(source.absolute()), **_summary(of)})
    else:
        console().print(f"{escape(str(source))} is complete: {_description(of)}")


def restore(
    context: typer.Context,
    source: _Source,
    digest: _Digest = None,
    max_bytes: _MaxBytes = None,
    as_json: AsJson = False,
) -> None:
    """
    Restore a backup into an empty place: a new database, a new data directory.

    The database is that of database_url, or the embedded one of the data directory. It must have no tables: nothing
    is replaced. The backup is verified first; a failure leaves the place as empty as it was.
    """
    settings, limit = settings_of(context), _bytes(max_bytes)
    with archive.opened(source) as opened:
        of = verification.read_manifest(opened, digest, limit)
        verification.verify(opened, of)
        with _database(settings, existing=False) as database:
            restoring.require_empty(database, opened, of, settings.data_dir)
            done = restoring.restore(database, opened, of, settings.data_dir, _shown_progress())
            target = {"created_at": of.created_at.isoformat()}
            auditing.note(database, "arriero restore", target, {"rows": of.rows, "revision": done.revision})
    missing = _models_without_files(settings)
    differing = _differing(context.obj, done.settings)
    if as_json:
        more = {"schema": done.revision, "open_runs": done.open_runs, "hosts": done.hosts}
        print_json({**_summary(of), **more, "settings_that_differ": differing, "models_without_files": missing})
        return
    console().print(f"restored: {_description(of)}")
    if done.revision != of.revision:
        console().print(f"the schema was upgraded from {of.revision} to {done.revision}")
    running = sum(done.open_runs.values())
    console().print(f"{running} runs were not over; they go on when processes are started")
    if missing:
        console().print(f"models without a file here: {escape(', '.join(missing))} (`arriero models pull NAME`)")
    if differing:
        console().print("settings that had other values at the place of the backup, and are not changed here:")
        for key, value in differing.items():
            console().print(f"  {escape(key)} = {escape(str(value))}")


@contextmanager
def _database(settings: Settings, *, existing: bool) -> Iterator[Database]:
    """
    Yield the database of the settings: an external one, or the embedded one, which is started if it does not run.

    Raises InvalidSettings when there must be an `existing` one and there is none.
    """
    with ExitStack() as stack:
        url = addresses.find_database(settings)
        if url is None:
            if existing and not (settings.data_dir / "postgres" / "data").is_dir():
                message = f"no database is set, and {settings.data_dir} has no embedded one"
                raise InvalidSettings([Problem("database_url", message, "ARRIERO_DATABASE_URL=postgresql://…")])
            command = "arriero backup" if existing else "arriero restore"
            held = stack.enter_context(DataDirectory(settings.data_dir, now=clock.now(), command=command))
            servers = stack.enter_context(embedded.started(held, valkey=False))
            assert servers.postgres is not None, "it was asked for"
            url = servers.postgres.url
        database = Database(url, pool_size=1)
        stack.callback(database.close)
        yield database


def _bytes(text: str | None) -> int | None:
    try:
        return None if text is None else sizes.parse(text)
    except ValueError as error:
        raise InvalidInput([Problem("--max-bytes", str(error))], "option") from None


def _own_settings(loaded: Loaded) -> dict[str, Any]:
    """Return the settings that are not defaults, without secrets and without what belongs to this machine."""
    return {
        key: shown(value)
        for key, value in values_of(loaded.settings)
        if loaded.origins[key] != "default" and not isinstance(value, SecretStr) and key not in {"data_dir"}
    }


def _differing(loaded: Loaded, before: Mapping[str, Any]) -> dict[str, Any]:
    here = {key: shown(value) for key, value in values_of(loaded.settings)}
    return {str(key): value for key, value in before.items() if here.get(key, value) != value}


def _models_without_files(settings: Settings) -> list[str]:
    """Return the models of the data directory's own catalogue whose file is not here."""
    own, missing = catalog_files.own_catalog(settings.data_dir), []
    for model in catalog_files.read_file(own).models if own.exists() else ():
        if model.remote is None:
            try:
                catalog_files.locate(model, settings.data_dir)
            except ModelFileUnusable:
                missing.append(model.name)
    return missing


def _summary(of: BackupManifest) -> dict[str, Any]:
    return {
        "created_at": of.created_at.isoformat(),
        "arriero": of.arriero,
        "postgres": of.postgres,
        "revision": of.revision,
        "tables": len(of.tables),
        "rows": of.rows,
        "bytes": of.bytes,
        "stored_bytes": of.stored_bytes,
        "runs": of.runs,
    }


def _description(of: BackupManifest) -> str:
    runs = sum(of.runs.values())
    return (
        f"{of.rows} rows of {len(of.tables)} tables, {runs} runs, {sizes.rounded(of.stored_bytes)} "
        f"(revision {of.revision}, Arriero {of.arriero}, {of.created_at:%Y-%m-%d %H:%M:%S %Z})"
    )


def _shown_progress() -> Callable[[str], object]:
    """Return a function that prints what is done next, at a terminal only."""
    printer = notes()
    return (lambda what: printer.print(what, style="dim")) if printer.is_terminal else (lambda _: None)
