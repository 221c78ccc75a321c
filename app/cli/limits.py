"""`arriero limits`: limits on calls of models and submissions of runs, of keys and namespaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.access.limits.limits import NAMES, SubjectKind
from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, settings_of, table
from app.kernel.errors import InvalidInput, Problem

app = typer.Typer(
    no_args_is_help=True,
    help="Limits on calls of models and submissions of runs, of keys and namespaces.\n\n"
    "Those of the settings (`arriero config show limits`) hold for every key and every namespace; these commands set "
    "others for one. 0 means no limit.\n\n"
    "Example: arriero limits set namespace research --requests 600 --tokens 100000",
)

_Kind = Annotated[SubjectKind, typer.Argument(help="`key` or `namespace`.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="The id of the key, or the name of the namespace.")]


@app.command()
def show(
    context: typer.Context,
    kind: Annotated[SubjectKind | None, typer.Argument(help="Only one: `key` or `namespace`, with its ID.")] = None,
    subject: Annotated[str | None, typer.Argument(metavar="ID")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the limits that hold: of the settings, and of keys and namespaces with limits of their own."""
    if (kind is None) != (subject is None):
        raise InvalidInput([Problem("ID", "a kind and an id belong together", "namespace research")], "arguments")
    with connected(settings_of(context)) as client:
        found = client.get("/v1/limits" if subject is None else _path(kind, subject))
    if as_json:
        print_json(found)
    elif subject is not None:
        _print([found])
    else:
        every = [{"kind": kind, "id": "(settings)", **found[f"{kind}s"]} for kind in SubjectKind]
        _print([*every, *found["limits"]])


@app.command("set")
def set_(
    context: typer.Context,
    kind: _Kind,
    subject: _Id,
    requests: Annotated[int | None, typer.Option("--requests", min=0, help="Most requests in a minute.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=0, help="Most tokens in a minute.")] = None,
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", min=0, help="Most calls that are being answered.")
    ] = None,
    waiting: Annotated[
        int | None, typer.Option("--waiting", min=0, help="Most interactive calls that no pool has begun.")
    ] = None,
    waiting_batch: Annotated[
        int | None, typer.Option("--waiting-batch", min=0, help="Most calls of the class batch that no pool has begun.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set the limits of a key or namespace. They replace its earlier ones; what is left out comes from the settings."""
    given = dict(zip(NAMES, (requests, tokens, concurrent, waiting, waiting_batch), strict=True))
    if all(value is None for value in given.values()):
        accepted = f"--requests, --tokens, --concurrent, --waiting; to remove limits: `arriero limits clear {kind} ID`"
        raise InvalidInput([Problem("limits", "no limit is set", accepted)], "request")
    with connected(settings_of(context)) as client:
        found = client.put(_path(kind, subject), given)
    print_json(found) if as_json else _print([found])


@app.command()
def clear(context: typer.Context, kind: _Kind, subject: _Id, as_json: AsJson = False) -> None:
    """Remove the limits of a key or namespace, so that those of the settings hold."""
    with connected(settings_of(context)) as client:
        found = client.delete(_path(kind, subject))
    print_json(found) if as_json else _print([found])


def _path(kind: SubjectKind | None, subject: str) -> str:
    return f"/v1/limits/{kind}/{quote(subject, safe='')}"


def _print(limits: Sequence[Mapping[str, Any]]) -> None:
    columns = ("kind", "id", "requests/min", "tokens/min", "calls at a time", "waiting", "waiting batch")
    printed = table(columns, right=columns[2:])
    for one in limits:
        own = one.get("set")
        values = [
            f"{one[name]}{'' if own is None or name in own else ' (settings)'}" if one[name] else "-" for name in NAMES
        ]
        printed.add_row(one["kind"], one["id"], *values)
    console().print(printed)
