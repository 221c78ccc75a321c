"""`arriero db`: the revision of the database's schema, its upgrade, and the roles of agents."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from sqlalchemy.engine import make_url

from app.access.agents import broker_rules, passwords, roles
from app.access.agents.roles import AgentRole
from app.cli import auditing
from app.cli.output import AsJson, console, print_json, settings_of
from app.kernel import addresses, ids
from app.kernel.database import Database, head_revision
from app.kernel.errors import InvalidInput, InvalidSettings, Problem
from app.kernel.processes import private_file
from app.kernel.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="The database: the revision of its schema, its upgrade, and the roles with which agents log in.\n\n"
    "`arriero up` upgrades an embedded database by itself; an external one is upgraded only by `db upgrade`.",
)


@app.command()
def upgrade(context: typer.Context, as_json: AsJson = False) -> None:
    """Upgrade the schema of the database to the revision that this version needs."""
    database = _database(context)
    before = database.revision()
    database.upgrade()
    after = database.revision()
    with database.work() as work:
        roles.renew_grants(work)
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


@app.command("create-agent-role")
def create_agent_role(
    context: typer.Context,
    host: Annotated[str, typer.Argument(help="The host for which the agent may speak (its setting fleet.host).")] = "",
    any_host: Annotated[
        bool, typer.Option("--any-host", help="One role for agents of any hosts, as a DaemonSet needs it.")
    ] = False,
    password_file: Annotated[
        Path | None, typer.Option(help="A file with the password; `-` reads it from standard input.")
    ] = None,
    url_file: Annotated[
        Path | None,
        typer.Option(help="Write the agent's database_url into this file (mode 0600), not to the terminal."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Create a role of Postgres for an agent and its pools, which has only the rights that they need.

    Without a password file the password is generated. The agent's database_url is printed once; Postgres stores only
    a verifier. `arriero hosts invite` makes such a role by itself when the host joins.
    """
    if any_host == bool(host):
        raise InvalidInput(
            [Problem("host", "give the name of a host, or --any-host", "one of both")], "role of an agent"
        )
    password = ids.new_secret() if password_file is None else _password(password_file)
    settings = settings_of(context)
    database = _database(context)
    try:
        database.require_head()
        with database.work() as work:
            made = roles.create(work, host or None, passwords.verifier(password, ids.new_salt()))
        auditing.note(database, "arriero db create-agent-role", {"role": made.role}, {"host": made.host})
    finally:
        database.close()
    url = _url_of(settings, made.role, password)
    if url_file is not None:
        private_file.write(url_file.absolute(), url + "\n")
    if as_json:
        print_json(_shown(made) | ({} if url_file else {"database_url": url}))
        return
    console().print(f"the role {made.role} was created", soft_wrap=True)
    if url_file is None:
        console().print("Its database_url has the password, which cannot be shown again:")
        typer.echo(url)


@app.command("list-agent-roles")
def list_agent_roles(context: typer.Context, as_json: AsJson = False) -> None:
    """List the roles with which agents log in."""
    database = _database(context)
    try:
        with database.work() as work:
            found = roles.listed(work)
    finally:
        database.close()
    if as_json:
        print_json({"roles": [_shown(role) for role in found]})
        return
    table = Table("role", "host", "created", box=None)
    for role in found:
        table.add_row(role.role, role.host or "any", f"{role.created_at:%Y-%m-%d %H:%M}")
    console().print(table)


@app.command("revoke-agent-role")
def revoke_agent_role(context: typer.Context, role: str) -> None:
    """Revoke a role of an agent: it loses its rights at once, also in sessions that are open."""
    database = _database(context)
    try:
        with database.work() as work:
            roles.revoke(work, role)
        auditing.note(database, "arriero db revoke-agent-role", {"role": role}, {})
    finally:
        database.close()
    console().print(f"the role {role} is revoked")


@app.command("agent-user")
def agent_user(
    password_file: Annotated[Path, typer.Option(help="A file with the password; `-` reads it from standard input.")],
) -> None:
    """
    Print the line of the broker's user for agents, for a file of users (`aclfile`) of Redis or Valkey.

    The line has the hash of the password. Give agents `rediss://arriero-agents:PASSWORD@HOST:PORT/0`.
    """
    typer.echo(broker_rules.line(_password(password_file)))


def _password(file: Path) -> str:
    """Read a password. Raises InvalidInput."""
    try:
        text = sys.stdin.read(1_000) if str(file) == "-" else file.read_text(encoding="ascii")[:1_000]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput([Problem("password-file", f"{file} cannot be read: {error}")], "password") from None
    password = text.removesuffix("\n").removesuffix("\r")
    if not passwords.is_valid(password):
        raise InvalidInput([Problem("password-file", "cannot be used as a password", passwords.ACCEPTED)], "password")
    return password


def _url_of(settings: Settings, role: str, password: str) -> str:
    """The address of the database of this process, for another role."""
    url = addresses.find_database(settings)
    assert url is not None, "it was used just now"
    return make_url(url).set(username=role, password=password).render_as_string(hide_password=False)


def _shown(role: AgentRole) -> dict[str, str | None]:
    return asdict(role) | {"created_at": role.created_at.isoformat()}


def _database(context: typer.Context) -> Database:
    settings = settings_of(context)
    url = addresses.find_database(settings)
    if url is None:
        message = "no database is set, and no embedded database runs in the data directory"
        raise InvalidSettings([Problem("database_url", message, "ARRIERO_DATABASE_URL=postgresql://…")])
    return Database(url, pool_size=1)
