"""`arriero db`: the revision of the database's schema, and its upgrade."""

from __future__ import annotations

import typer

from app.cli import auditing
from app.cli.output import AsJson, console, print_json, settings_of
from app.kernel import addresses
from app.kernel.database import Database, head_revision
from app.kernel.errors import InvalidSettings, Problem

app = typer.Typer(
    no_args_is_help=True,
    help="The database: the revision of its schema, and its upgrade.\n\n"
    "`arriero up` upgrades an embedded database by itself; an external one is upgraded only by `db upgrade`.",
)


@app.command()
def upgrade(context: typer.Context, as_json: AsJson = False) -> None:
    """Upgrade the schema of the database to the revision that this version needs."""
    database = _database(context)
    before = database.revision()
    database.upgrade()
    after = database.revision()
    if before != after:
        auditing.note(database, "arriero db upgrade", {"revision": str(after)}, {"before": before})
    database.close()
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        console().print(f"the schema is already at revision {after}")
    else:
        console().print(f"the schema was upgraded from {before or 'an empty database'} to {after}")


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Print the revision of the schema. Exits with 5 when it is not the one that this version needs."""
    database = _database(context)
    revision, head = database.revision(), head_revision()
    if as_json:
        print_json({"revision": revision, "needed": head})
    else:
        console().print(f"the schema is at revision {revision or 'none'}; this version needs {head}")
    database.close()
    if revision != head:
        raise typer.Exit(5)


def _database(context: typer.Context) -> Database:
    settings = settings_of(context)
    url = addresses.find_database(settings)
    if url is None:
        message = "no database is set, and no embedded database runs in the data directory"
        raise InvalidSettings([Problem("database_url", message, "ARRIERO_DATABASE_URL=postgresql://…")])
    return Database(url, pool_size=1)
