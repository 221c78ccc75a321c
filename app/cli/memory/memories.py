"""`arriero remember`, `arriero memories` and `arriero forget`: what is remembered beyond one conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from app.cli.client import Client, connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, table
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security.texts import printable
from app.memory.memories.kinds import MemoryKind

app = typer.Typer(
    no_args_is_help=True,
    help="Memories: facts, preferences, decisions, breakthroughs and patterns that outlast a conversation.\n\n"
    "Example: arriero memories list --user ana --kind preference",
)

_Id = Annotated[str, typer.Argument(metavar="ID", help="The id of a memory: mem_…")]
_User = Annotated[str | None, typer.Option("--user", "-u", help="The user whose memories are meant.")]
_Note = Annotated[str, typer.Option("--note", help="Why, in words; the history shows it.")]


class Switch(StrEnum):
    """Whether memories are extracted."""

    ON = "on"
    OFF = "off"
    DEFAULT = "default"


def remember(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="One short statement.")],
    kind: Annotated[MemoryKind, typer.Option("--kind", "-k", help="What it states.")] = MemoryKind.FACT,
    user: Annotated[str | None, typer.Option("--user", "-u", help="Whose it is; by default the namespace's.")] = None,
    importance: Annotated[float, typer.Option(min=0, max=1, help="How much it matters.")] = 0.5,
    supersedes: Annotated[
        str | None, typer.Option(help="The id of a memory that no longer holds, and whose place this takes.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Since when it holds: 2026-11-01T00:00:00Z. By default now.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Remember a statement. One that is known already is not written twice.

    Example: arriero remember "Ana prefers tea to coffee" --kind preference --user ana
    """
    body = {"text": text, "kind": kind, "user": user, "importance": importance}
    body |= {name: one for name, one in (("supersedes", supersedes), ("valid_from", since)) if one is not None}
    with connected(settings_of(context)) as client:
        found = client.post("/v1/memories", body)
    if as_json:
        print_json(found)
        return
    typer.echo(found["id"])
    if not found["created"]:
        notes().print("[dim]it was known already[/]")


@app.command("list")
def list_memories(
    context: typer.Context,
    user: _User = None,
    kind: Annotated[MemoryKind | None, typer.Option("--kind", "-k", help="Only these.")] = None,
    conversation: Annotated[str | None, typer.Option(help="Only those that come from this conversation.")] = None,
    as_of: Annotated[str | None, typer.Option(help="Those that held then: 2026-11-01T00:00:00Z.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that hold no more.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List memories that hold, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get(
            "/v1/memories",
            user=user,
            kind=kind,
            conversation=conversation,
            as_of=as_of,
            limit=limit,
            **({"all": True} if everything else {}),
        )
    if as_json:
        print_json(found)
    elif found["memories"]:
        _print(found["memories"])
        if found["has_more"]:
            notes().print("[dim]there are more: --limit[/]")
    else:
        console().print("there are no memories")


@app.command()
def show(context: typer.Context, memory_id: _Id, as_json: AsJson = False) -> None:
    """Show a memory with its sources."""
    with connected(settings_of(context)) as client:
        found = client.get(_path(memory_id))
    if as_json:
        print_json(found)
        return
    printed = table(("field", "value"))
    for name, value in found.items():
        if name != "sources":
            printed.add_row(name, Text("-" if value is None else printable(str(value))))
    for source in found["sources"]:
        what = source["message"] or source["run"] or source["author"]
        printed.add_row("source", Text(printable(f"{source['origin']} {what} ({source['author']})")))
    console().print(printed)


@app.command()
def history(context: typer.Context, memory_id: _Id, as_json: AsJson = False) -> None:
    """Show what was true before and after a memory, and what happened to each."""
    with connected(settings_of(context)) as client:
        found = client.get(f"{_path(memory_id)}/history")
    if as_json:
        print_json(found)
        return
    _print(found["memories"])
    printed = table(("at", "memory", "event", "by", "note"))
    for one in found["events"]:
        note = " ".join(filter(None, (one["note"], one["detail"])))
        author = Text(printable(one["author"]))
        printed.add_row(one["at"][:19], one["memory"], one["event"], author, Text(printable(note)))
    console().print(printed)


@app.command()
def breakthrough(
    context: typer.Context,
    memory_id: _Id,
    undo: Annotated[bool, typer.Option("--undo", help="It is none, after all.")] = False,
    note: _Note = "",
    as_json: AsJson = False,
) -> None:
    """Mark a memory as a breakthrough: an insight that changed the work."""
    with connected(settings_of(context)) as client:
        found = client.post(f"{_path(memory_id)}/breakthrough", {"breakthrough": not undo, "note": note})
    if as_json:
        print_json(found)
    else:
        console().print(Text(f"{found['id']} is a {found['kind']}"))


@app.command()
def invalidate(
    context: typer.Context,
    memory_id: _Id,
    at: Annotated[str | None, typer.Option(help="Since when: 2026-11-01T00:00:00Z. By default now.")] = None,
    note: _Note = "",
    as_json: AsJson = False,
) -> None:
    """End a memory: it holds no more. Its text stays, for reads as of then; `arriero forget` deletes it."""
    body = {"note": note, **({} if at is None else {"at": at})}
    with connected(settings_of(context)) as client:
        found = client.post(f"{_path(memory_id)}/invalidate", body)
    if as_json:
        print_json(found)
    else:
        console().print(Text(f"{found['id']} holds no more since {found['invalid_at'][:19]}"))


@app.command()
def refused(
    context: typer.Context,
    reason: Annotated[str | None, typer.Option(help="Only those that were refused for this reason.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000)] = 50,
    as_json: AsJson = False,
) -> None:
    """List what models proposed and the write gate refused, with the reasons."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/memories/refused", reason=reason, limit=limit)
    if as_json:
        print_json(found)
        return
    printed = table(("at", "reason", "text", "detail"))
    for one in found["refused"]:
        printed.add_row(
            one["created_at"][:19], one["reason"], Text(printable(one["text"])), Text(printable(one["detail"]), "dim")
        )
    console().print(printed)
    console().print(", ".join(f"{name}: {count}" for name, count in found["reasons"].items()) or "nothing was refused")


@app.command()
def extraction(
    context: typer.Context,
    switch: Annotated[Switch | None, typer.Argument(help="on, off, or default (as the settings have it).")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model that extracts, or a selector.")] = None,
    conversation: Annotated[str | None, typer.Option(help="For this conversation only.")] = None,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="With --conversation: also what was said before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Show or choose whether new messages are read for memories, in the background. This calls a model.

    Example: arriero memories extraction on --model qwen3:4b
    """
    enabled = {None: None, Switch.ON: True, Switch.OFF: False, Switch.DEFAULT: None}[switch]
    path = "/v1/memories/extraction" + (f"/{quote(conversation, safe='')}" if conversation else "")
    if switch is None and (model is not None or from_start):
        raise InvalidInput([Problem("SWITCH", "nothing is chosen without it", "on, off or default")], "command")
    if conversation is not None and model is not None:
        raise InvalidInput([Problem("--model", "a namespace chooses the model", "no --conversation")], "command")
    with connected(settings_of(context)) as client:
        if switch is None:
            found = client.get(path)
        elif conversation is None:
            found = client.put(path, {"enabled": enabled, "model": model})
        else:
            found = client.put(path, {"enabled": enabled, "from_start": from_start})
    if as_json:
        print_json(found)
        return
    printed = table(("field", "value"))
    for name, value in found.items():
        printed.add_row(name.replace("_", " "), Text("-" if value in (None, "") else printable(str(value))))
    console().print(printed)


def forget(
    context: typer.Context,
    memory_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of memories.")] = None,
    query: Annotated[
        str | None, typer.Option("--query", "-q", help="Show the memories that are meant, and ask.")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", "-u", help="With --query: of this user only.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="With --user: all memories of that user.")] = False,
    with_history: Annotated[
        bool, typer.Option("--with-history", help="Also those that they superseded and that superseded them.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Delete memories for real, and show that a search finds them no more.

    Example: arriero forget --query coffee --user ana
    """
    if sum((bool(memory_ids), query is not None, everything)) != 1:
        raise InvalidInput([Problem("", "it is not said what to forget", "ids, --query or --everything")], "command")
    with connected(settings_of(context)) as client:
        if query is not None:
            memory_ids = _chosen(client, query, user, yes=yes)
            if not memory_ids:
                return
        elif not yes:
            what = f"all memories of {user}" if everything else f"{len(memory_ids or ())} memories"
            typer.confirm(f"delete {printable(what)}?", abort=True, err=True)
        body: dict[str, Any] = {"user": user, "everything": True} if everything else {"ids": memory_ids}
        if with_history:
            body["with_history"] = True
        found = client.post("/v1/memories/forget", body)
    if as_json:
        print_json(found)
        return
    console().print(f"{len(found['forgotten'])} forgotten")
    printed = table(("searched afterwards", "by", "found"), right=("found",))
    for one in found["searched"]:
        printed.add_row(one["where"], one["by"], str(one["found"]))
    console().print(printed)
    if found["messages"]:
        count = len(found["messages"])
        notes().print(f"[yellow]{count} messages that said it are still in their conversations[/]")


def _chosen(client: Client, query: str, user: str | None, *, yes: bool) -> list[str]:
    """Return the ids of the memories that a query means, if the user agrees."""
    body = {"query": query, **({} if user is None else {"user": user})}
    matches = client.post("/v1/memories/forget", body)["matches"]
    if not matches:
        console().print("there are no such memories")
        return []
    if not yes:
        _print(matches)
        typer.confirm(f"delete these {len(matches)}?", abort=True, err=True)
    return [one["id"] for one in matches]


def _path(memory_id: str) -> str:
    return f"/v1/memories/{quote(memory_id, safe='')}"


def _print(found: Sequence[Mapping[str, Any]]) -> None:
    printed = table(("id", "kind", "user", "text", "since", "until"))
    for one in found:
        printed.add_row(
            one["id"],
            one["kind"],
            Text("-" if one["user"] is None else printable(one["user"])),
            Text(printable(one["text"])),
            one["valid_from"][:10],
            "" if one["invalid_at"] is None else one["invalid_at"][:10],
        )
    console().print(printed)
