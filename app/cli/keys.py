"""`arriero keys`: API keys, which are created, listed, rotated and revoked."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from app.access.callers import KeyScope
from app.cli.client import connected
from app.cli.output import AsJson, ago, console, notes, print_json, settings_of, table
from app.kernel import clock
from app.kernel.security.texts import printable

app = typer.Typer(
    no_args_is_help=True,
    help="API keys: who may call the API, and what they may do.\n\n"
    "On this machine no key is needed while the API listens on a loopback address only. A key is sent with the setting "
    "`api.key` (ARRIERO_API__KEY), by other programs in the header `Authorization: Bearer`.\n\n"
    "Example: arriero keys create triage-service --scope submit --scope read --namespace research",
)

_Id = Annotated[str, typer.Argument(metavar="KEY_ID", help="The public part of a key, as `keys list` shows it.")]


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for, such as triage-service.")],
    scope: Annotated[
        list[KeyScope] | None,
        typer.Option("--scope", help="What it may do; may be repeated. By default submit and read."),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(help="The only namespace that it sees. By default it sees all, or that of your key.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="The time until it expires: '90d'. By default never.")] = None,
    direct: Annotated[
        bool,
        typer.Option("--direct", help="Write to the database of the settings, without the API: for the first key."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create a key, and print it on standard output. It is shown only now: its hash is what is stored."""
    scopes = scope or [KeyScope.SUBMIT, KeyScope.READ]
    if direct:
        # Imported now: the other commands need no database.
        create_directly = importlib.import_module("app.cli.direct_keys").create
        made = create_directly(settings_of(context), name, scopes, namespace, expires)
    else:
        body = {"name": name, "scopes": scopes, "namespace": namespace, "expires_in": expires}
        with connected(settings_of(context)) as client:
            made = client.post("/v1/keys", body)
    _print_new(made, as_json=as_json)


@app.command("list")
def list_keys(context: typer.Context, as_json: AsJson = False) -> None:
    """List the keys, without their secrets; revoked and expired ones too."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/keys")
    if as_json:
        print_json(found)
    elif found["keys"]:
        _print(found["keys"])
    else:
        console().print("there are no keys")


@app.command()
def show(context: typer.Context, key_id: _Id, as_json: AsJson = False) -> None:
    """Show a key, without its secret."""
    with connected(settings_of(context)) as client:
        found = client.get(_path(key_id))
    if as_json:
        print_json(found)
        return
    printed = table(("field", "value"))
    for field, value in found.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        shown = "all" if field == "namespace" and value is None else shown
        printed.add_row(field, Text("-" if shown is None else printable(str(shown))))
    console().print(printed)


@app.command()
def rotate(
    context: typer.Context,
    key_id: _Id,
    overlap: Annotated[str, typer.Option(help="How long the old secret works beside the new one.")] = "1d",
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret, and print the new key. The old secret works for the overlap."""
    with connected(settings_of(context)) as client:
        made = client.post(f"{_path(key_id)}/rotate", {"overlap": overlap})
    _print_new(made, as_json=as_json)


@app.command()
def revoke(context: typer.Context, key_id: _Id, as_json: AsJson = False) -> None:
    """End a key. It is refused within seconds; the runs that were submitted with it continue."""
    with connected(settings_of(context)) as client:
        found = client.post(f"{_path(key_id)}/revoke")
    if as_json:
        print_json(found)
    else:
        console().print(Text(f"the key {found['id']} ({printable(found['name'])}) is revoked"))


def _path(key_id: str) -> str:
    return f"/v1/keys/{quote(key_id, safe='')}"


def _print_new(made: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    typer.echo(made["key"])
    until = f"; the old secret works until {made['overlap_until']:.19}" if made["overlap_until"] else ""
    expires = f", expires {made['expires_at']:.10}" if made["expires_at"] else ""
    notes().print(
        Text(
            f"key {made['id']} ({printable(made['name'])}): {', '.join(made['scopes'])}; "
            f"{_namespace(made)}{expires}{until}. It is not shown again."
        )
    )


def _namespace(key: Mapping[str, Any]) -> str:
    return "all namespaces" if key["namespace"] is None else f"namespace {key['namespace']}"


def _print(found: Sequence[Mapping[str, Any]]) -> None:
    now = clock.now()
    printed = table(("id", "name", "namespace", "scopes", "state", "last used", "created by"))
    for one in found:
        printed.add_row(
            one["id"],
            Text(printable(one["name"])),
            one["namespace"] or Text("all", "dim"),
            ", ".join(one["scopes"]),
            _state(one, now),
            "never" if one["used_at"] is None else ago(one["used_at"], now),
            Text(printable(one["created_by"])),
        )
    console().print(printed)


def _state(key: Mapping[str, Any], now: datetime) -> Text:
    expires, overlap = _instant(key["expires_at"]), _instant(key["overlap_until"])
    if key["revoked_at"] is not None:
        return Text("revoked", "bold red")
    if expires is not None and expires <= now:
        return Text("expired", "bold red")
    if overlap is not None and overlap > now:
        return Text(f"rotating until {overlap:%Y-%m-%d %H:%M}", "yellow")
    return Text("valid" if expires is None else f"valid until {expires:%Y-%m-%d}", "green")


def _instant(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).astimezone(UTC)
