"""`arriero handoffs`: check, store and try hand-offs; list, mend and replay their messages; show scores, mailboxes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import texts
from app.cli.client import connected
from app.cli.output import AsJson, ago, console, named, print_json, settings_of, shortened, state, table
from app.handoffs import check as checks
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem

app = typer.Typer(
    no_args_is_help=True,
    help="Hand-offs: messages from one protocol to another.\n\n"
    "What is invalid or failed is kept: list it, mend it, or replay it.\n\n"
    "Example: arriero handoffs messages new-leads --state invalid",
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of a hand-off.")]
_Id = Annotated[str, typer.Argument(metavar="MESSAGE_ID", help="The id of a message, as `handoffs messages` shows it.")]
_File = Annotated[Path, typer.Argument(metavar="FILE", help="A hand-off in YAML or JSON.")]
_Message = Annotated[Path, typer.Option("--message", metavar="FILE", help="A message: a JSON object in a file.")]
#: Characters of a problem in a table.
_WIDTH = 80


@app.command("list")
def list_handoffs(context: typer.Context, as_json: AsJson = False) -> None:
    """List hand-offs."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/handoffs")
    if as_json:
        print_json(found)
        return
    printed = table(("hand-off", "version", "source", "target", "address"))
    for one in found["handoffs"]:
        printed.add_row(named(one), str(one["version"]), one["source"], one["target"], one["path"])
    console().print(printed if printed.row_count else "there are no hand-offs")


@app.command()
def show(context: typer.Context, name: _Name) -> None:
    """Print the newest version of a hand-off as JSON."""
    with connected(settings_of(context)) as client:
        print_json(client.get(f"/v1/handoffs/{name}"))


@app.command()
def check(files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Hand-offs in YAML or JSON.")]) -> None:
    """Check hand-offs, and run the tests in them. Needs no server. Reports all problems."""
    problems = []
    for file in files:
        try:
            handoff = checks.parse(texts.read(file))
        except InvalidInput as error:
            problems += [
                Problem(f"{file}: {p.where}".rstrip(": "), p.message, p.accepted, p.line) for p in error.problems
            ]
        else:
            typer.echo(f"{file}: {handoff.handoff} is valid, {len(handoff.tests)} tests passed")
    if problems:
        raise InvalidInput(problems, checks.SUBJECT)


@app.command()
def put(context: typer.Context, file: _File, as_json: AsJson = False) -> None:
    """Store a hand-off as the newest version of the name in the file."""
    text = texts.read(file)
    name = checks.parse(text).handoff
    with connected(settings_of(context)) as client:
        stored = client.put_text(f"/v1/handoffs/{name}", text, "application/yaml")
    if as_json:
        print_json(stored)
    else:
        typer.echo(f"{name} version {stored['version']}, messages arrive at {stored['path']}")


@app.command()
def delete(context: typer.Context, name: _Name) -> None:
    """Remove a hand-off. The records of its messages are kept."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/handoffs/{name}")
    typer.echo(f"{name} is removed")


@app.command("test")
def trial(context: typer.Context, name: _Name, message: _Message, as_json: AsJson = False) -> None:
    """Show what would come of a message. Nothing is stored or sent. Exits with 1 when it would be refused."""
    with connected(settings_of(context)) as client:
        found = client.post(f"/v1/handoffs/{name}/test", {"message": _read(message)})
    if as_json:
        print_json(found)
    else:
        for problem in found["problems"]:
            typer.echo(_line(problem), err=True)
        if found["valid"]:
            print_json(found["payload"])
    if not found["valid"]:
        raise typer.Exit(1)


@app.command()
def messages(
    context: typer.Context,
    name: _Name,
    with_state: Annotated[
        str | None, typer.Option("--state", help="received, delivering, delivered, invalid, failed or skipped.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most messages.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Continue where an earlier page ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """List messages, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/handoffs/{name}/messages", state=with_state, limit=limit, cursor=cursor)
    if as_json:
        print_json(found)
        return
    printed, now = table(("id", "received", "state", "sender", "again", "problem")), clock.now()
    for one in found["messages"]:
        problem = _line(one["problems"][0]) if one["problems"] else ""
        printed.add_row(
            one["id"],
            ago(one["received_at"], now),
            state(one["state"]),
            shortened(one["sender"], 30),
            str(one["duplicates"]),
            shortened(problem, _WIDTH),
        )
    console().print(printed if printed.row_count else "there are no such messages")
    if found["next_cursor"]:
        typer.echo(f"more: --cursor {found['next_cursor']}", err=True)


@app.command()
def message(context: typer.Context, name: _Name, message_id: _Id) -> None:
    """Print a message with its content, its stages and what came of it, as JSON."""
    with connected(settings_of(context)) as client:
        print_json(client.get(f"/v1/handoffs/{name}/messages/{message_id}"))


@app.command()
def submit(
    context: typer.Context,
    name: _Name,
    message: _Message,
    key: Annotated[str | None, typer.Option("--key", help="By which the message is known when it comes again.")] = None,
) -> None:
    """Hand on a message."""
    headers = {"Idempotency-Key": key} if key else None
    with connected(settings_of(context)) as client:
        print_json(client.post(f"/v1/handoffs/{name}/messages", _read(message), headers=headers))


@app.command()
def mend(context: typer.Context, name: _Name, message_id: _Id, message: _Message) -> None:
    """Send a message again with another content, which must be valid."""
    with connected(settings_of(context)) as client:
        sent = client.post(f"/v1/handoffs/{name}/messages/{message_id}/mend", {"message": _read(message)})
    typer.echo(f"{sent['id']} is {sent['state']}")


@app.command()
def replay(context: typer.Context, name: _Name, message_id: _Id) -> None:
    """Send a message again as it came."""
    with connected(settings_of(context)) as client:
        sent = client.post(f"/v1/handoffs/{name}/messages/{message_id}/replay")
    typer.echo(f"{sent['id']} is {sent['state']}")


@app.command()
def scores(
    context: typer.Context,
    name: _Name,
    window: Annotated[str, typer.Option(help="Up to now, such as 1h or 7d.")] = "1d",
    as_json: AsJson = False,
) -> None:
    """Show accuracy, completeness, timeliness and success, in all and by sender."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/handoffs/{name}/scores", window=window)
    if as_json:
        print_json(found)
        return
    printed = table(("sender", "messages", "success", "accuracy", "completeness", "timeliness", "again"))
    for one in (found["total"], *found["senders"]):
        parts = [_part(one[name]) for name in ("success", "accuracy", "completeness", "timeliness")]
        sender = "(all)" if one["sender"] is None else shortened(one["sender"], 40)
        printed.add_row(sender, str(one["messages"]), *parts, str(one["duplicates"]))
    console().print(printed)
    console().print(f"target: {found['target']:.0%} delivered")


@app.command()
def mailbox(context: typer.Context, name: _Name, as_json: AsJson = False) -> None:
    """Show the mailbox of a hand-off: whether it is connected, and how far it has been read."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/handoffs/{name}/mailbox")
    if as_json:
        print_json(found)
        return
    printed = table(("mailbox", "connected", "waits for", "read", "next UID", "failed"))
    place = f"{found['server']} {found['folder']}"
    is_there = "yes" if found["is_connected"] else "no"
    read = ago(found["seen_at"], clock.now())
    printed.add_row(place, is_there, found["waits_for"], read, str(found["next_uid"]), str(len(found["failed"])))
    console().print(printed)
    if found["error"]:
        typer.echo(f"error: {found['error']}")


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _line(problem: Mapping[str, Any]) -> str:
    accepted = f"; accepted: {problem['accepted']}" if problem["accepted"] else ""
    return f"{problem['where']}: {problem['message']}{accepted}"


def _read(file: Path) -> Any:
    try:
        return json.loads(texts.read(file))
    except (ValueError, RecursionError) as error:
        raise InvalidInput([Problem(str(file), f"this is not JSON: {error}", "a JSON object")], "message") from None
