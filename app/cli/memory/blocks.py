"""`arriero blocks`: memory blocks, which prompts contain and models edit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import click
import typer

from app.cli import texts
from app.cli.client import Client, connected
from app.cli.memory import block_templates
from app.cli.output import AsJson, ago, console, notes, print_json, print_text, settings_of, shortened, table
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem
from app.memory.blocks.block import PREFIX, BlockTargetKind

app = typer.Typer(no_args_is_help=True, help="Memory blocks: labelled texts in prompts, which models can edit.")
app.add_typer(block_templates.app, name="templates")

#: Most bytes of a text that is read.
_MAX_BYTES = 1024 * 1024

BlockName = Annotated[str, typer.Argument(metavar="BLOCK", help="The id of a block, or a label that only one has.")]
OfUser = Annotated[str | None, typer.Option("--user", "-u", help="The name of a user.")]
OfConversation = Annotated[str | None, typer.Option("--conversation", help="The id of a conversation.")]
OfAgent = Annotated[str | None, typer.Option("--agent", help="The name of an agent.")]
ForAll = Annotated[bool, typer.Option("--everybody", help="Every prompt of the namespace.")]
ValueFile = Annotated[str | None, typer.Option("--file", "-f", help="A file with the value; - for standard input.")]
Value = Annotated[str | None, typer.Option("--value", help="The value.")]


@app.command("list")
def list_blocks(
    context: typer.Context,
    label: Annotated[str | None, typer.Option(help="Only blocks with this label.")] = None,
    archived: Annotated[
        bool | None, typer.Option("--archived/--in-context", help="Only archived ones, or only those in context.")
    ] = None,
    user: OfUser = None,
    conversation: OfConversation = None,
    agent: OfAgent = None,
    query: Annotated[str | None, typer.Option("--query", "-q", help="A part of the label or of the texts.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most blocks.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Continue where an earlier page ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """List blocks, the newest first."""
    wanted = {"label": label, "archived": archived, "user": user, "conversation": conversation, "agent": agent}
    with connected(settings_of(context)) as client:
        found = client.get("/v1/blocks", **wanted, query=query, limit=limit, cursor=cursor)
    if as_json:
        print_json(found)
        return
    printed = table(("block", "label", "version", "characters", "attached to", "changed", "value"))
    now = clock.now()
    for row in found["blocks"]:
        state = " archived" if row["archived_at"] else ""
        label = f"{row['label']}{' (read-only)' if row['read_only'] else ''}"
        used = f"{row['characters']}/{row['limit']}"
        attached = ", ".join(_target(one) for one in row["attached"]) + state
        printed.add_row(
            *(row["id"], label, str(row["version"]), used, attached or "-", ago(row["updated_at"], now)),
            shortened(row["value"], 60),
        )
    console().print(printed)
    if found["next_cursor"]:
        notes().print(f"more: arriero blocks list --cursor {found['next_cursor']}", style="dim")


@app.command()
def show(context: typer.Context, block: BlockName, as_json: AsJson = False) -> None:
    """Show a block: what it is attached to, and its value."""
    with connected(settings_of(context)) as client:
        found = _found(client, block)
    if as_json:
        print_json(found)
        return
    read_only = ", read-only" if found["read_only"] else ""
    notes().print(
        f"{found['label']} ({found['id']}), version {found['version']}, {found['characters']} of {found['limit']} "
        f"characters{read_only}{', archived' if found['archived_at'] else ''}",
        style="dim",
        markup=False,
    )
    if found["description"]:
        notes().print(found["description"], style="dim", markup=False)
    attached = ", ".join(_target(one) for one in found["attached"]) or "nothing"
    notes().print(f"attached to: {attached}", style="dim", markup=False)
    print_text(found["value"])


@app.command()
def create(
    context: typer.Context,
    label: Annotated[str, typer.Argument(metavar="LABEL", help="Its label, which never changes.")],
    value: Value = None,
    file: ValueFile = None,
    description: Annotated[str, typer.Option(help="What it is for; models read it.")] = "",
    limit: Annotated[int | None, typer.Option(help="Most characters; by default 2000.")] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Models cannot edit it.")] = False,
    user: OfUser = None,
    conversation: OfConversation = None,
    agent: OfAgent = None,
    everybody: ForAll = False,
    as_json: AsJson = False,
) -> None:
    """Create a block, attach it to what is named, and print its id."""
    body = {
        "label": label,
        "value": _text(value, file) or "",
        "description": description,
        "read_only": read_only,
        "attach": _targets(user, conversation, agent, everybody=everybody),
        **({} if limit is None else {"limit": limit}),
    }
    with connected(settings_of(context)) as client:
        made = client.post("/v1/blocks", body)
    if as_json:
        print_json(made)
    else:
        typer.echo(made["id"])


@app.command()
def edit(
    context: typer.Context,
    block: BlockName,
    value: Value = None,
    file: ValueFile = None,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most characters.")] = None,
    read_only: Annotated[
        bool | None, typer.Option("--read-only/--editable", help="Whether models can edit it.")
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="The version that the change is based on; by default the newest.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Edit a block, which makes a new version. Without options its value is opened in $EDITOR.

    If somebody else edits it meanwhile, nothing is changed, and the command exits with 4.
    """
    with connected(settings_of(context)) as client:
        found = _found(client, block)
        text = _text(value, file)
        if all(one is None for one in (text, description, limit, read_only)):
            text = _from_editor(found["value"])
        changes = {"value": text, "description": description, "limit": limit, "read_only": read_only}
        given = {name: one for name, one in changes.items() if one is not None}
        changed = client.patch(_path(found), {"version": version or found["version"], **given})
    if as_json:
        print_json(changed)
    else:
        typer.echo(f"{changed['label']} is at version {changed['version']}")


@app.command()
def diff(
    context: typer.Context,
    block: BlockName,
    old: Annotated[int | None, typer.Option("--from", min=1, help="By default the version before.")] = None,
    new: Annotated[int | None, typer.Option("--to", min=1, help="By default the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what changed between two versions, as a unified diff."""
    with connected(settings_of(context)) as client:
        given = {"from": old, "to": new}
        found = client.get(f"{_path(_found(client, block))}/diff", **given)
    if as_json:
        print_json(found)
        return
    if found["diff"]:
        print_text(found["diff"])
    others = [name for name in found["changed"] if name != "value"]
    if others or not found["diff"]:
        changed = f"{' and '.join(others)} changed" if others else "nothing changed"
        notes().print(f"versions {found['from_version']} and {found['to_version']}: {changed}", style="dim")


@app.command()
def history(
    context: typer.Context,
    block: BlockName,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most versions.")] = 20,
    before: Annotated[int | None, typer.Option(min=1, help="Only versions before this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the versions of a block, the newest first, each with its author."""
    with connected(settings_of(context)) as client:
        found = client.get(f"{_path(_found(client, block))}/versions", limit=limit, before=before)
    if as_json:
        print_json(found)
        return
    printed = table(("version", "when", "by", "what", "value"))
    now = clock.now()
    for row in found["versions"]:
        author = row["author"]
        by = author["name"] + (f" in run {author['run_id']}, step {author['step']}" if author["run_id"] else "")
        printed.add_row(
            *(str(row["version"]), ago(row["created_at"], now), by, row["operation"], shortened(row["value"], 60))
        )
    console().print(printed)


@app.command()
def rollback(
    context: typer.Context,
    block: BlockName,
    version: Annotated[int, typer.Argument(min=1, help="The version that comes back.")],
    as_json: AsJson = False,
) -> None:
    """Make a new version that says what an earlier one said."""
    with connected(settings_of(context)) as client:
        found = _found(client, block)
        changed = client.post(f"{_path(found)}/rollback", {"to": version, "version": found["version"]})
    if as_json:
        print_json(changed)
    else:
        typer.echo(f"{changed['label']} is at version {changed['version']}, which says what version {version} said")


@app.command()
def attach(
    context: typer.Context,
    block: BlockName,
    user: OfUser = None,
    conversation: OfConversation = None,
    agent: OfAgent = None,
    everybody: ForAll = False,
) -> None:
    """Attach a block to a user, a conversation, an agent, or everybody: it is in their prompts."""
    _change_attachments(context, block, "attach", _targets(user, conversation, agent, everybody=everybody))


@app.command()
def detach(
    context: typer.Context,
    block: BlockName,
    user: OfUser = None,
    conversation: OfConversation = None,
    agent: OfAgent = None,
    everybody: ForAll = False,
) -> None:
    """Detach a block. It is kept."""
    _change_attachments(context, block, "detach", _targets(user, conversation, agent, everybody=everybody))


@app.command()
def archive(context: typer.Context, block: BlockName) -> None:
    """Take a block out of prompts. Recall finds it."""
    with connected(settings_of(context)) as client:
        found = client.post(f"{_path(_found(client, block))}/archive")
    typer.echo(f"{found['label']} is archived")


@app.command()
def restore(context: typer.Context, block: BlockName) -> None:
    """Take an archived block back into prompts."""
    with connected(settings_of(context)) as client:
        found = client.post(f"{_path(_found(client, block))}/restore")
    typer.echo(f"{found['label']} is in context")


@app.command()
def delete(context: typer.Context, block: BlockName) -> None:
    """Delete a block with all its versions."""
    with connected(settings_of(context)) as client:
        found = _found(client, block)
        client.delete(_path(found))
    typer.echo(f"{found['label']} ({found['id']}) is deleted")


@app.command()
def prompt(
    context: typer.Context,
    user: OfUser = None,
    conversation: OfConversation = None,
    agent: OfAgent = None,
    as_json: AsJson = False,
) -> None:
    """Print the blocks of a user, conversation or agent as a prompt contains them."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/blocks/in-context", user=user, conversation=conversation, agent=agent)
    if as_json:
        print_json(found)
    else:
        print_text(found["text"])


@app.command()
def apply(
    context: typer.Context,
    template: Annotated[str, typer.Argument(metavar="TEMPLATE", help="The name of a template.")],
    user: OfUser = None,
    conversation: OfConversation = None,
    agent: OfAgent = None,
    everybody: ForAll = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep blocks with these labels that are there already.")] = False,
) -> None:
    """Create all blocks of a template and attach them; print their ids and labels."""
    targets = _targets(user, conversation, agent, everybody=everybody)
    body = {"attach": _required(targets), "existing": "keep" if keep else "refuse"}
    with connected(settings_of(context)) as client:
        made = client.post(f"/v1/block-templates/{quote(template, safe='')}/apply", body)
    for id_, label in zip(made["ids"], made["labels"], strict=True):
        typer.echo(f"{id_} {label}")


def _change_attachments(context: typer.Context, block: str, action: str, targets: list[dict[str, str]]) -> None:
    with connected(settings_of(context)) as client:
        found = _found(client, block)
        for target in _required(targets):
            found = client.post(f"{_path(found)}/{action}", target)
    attached = ", ".join(_target(one) for one in found["attached"]) or "nothing"
    typer.echo(f"{found['label']} is attached to {attached}")


def _found(client: Client, name: str) -> dict[str, Any]:
    """Return the block with an id, or the only one with a label. Raises NotFound, InvalidInput."""
    if name.startswith(PREFIX):
        return dict(client.get(f"/v1/blocks/{quote(name, safe='')}"))
    found = client.get("/v1/blocks", label=name[:64], limit=20)["blocks"]
    if len(found) == 1:
        return dict(found[0])
    if not found:
        return dict(client.get(f"/v1/blocks/{quote(name, safe='')}"))
    ids = ", ".join(f"{row['id']} ({', '.join(map(_target, row['attached'])) or 'not attached'})" for row in found)
    raise InvalidInput([Problem("BLOCK", f"{len(found)} blocks have the label {name!r}", f"an id: {ids}")], "argument")


def _path(block: Mapping[str, Any]) -> str:
    return f"/v1/blocks/{block['id']}"


def _targets(user: str | None, conversation: str | None, agent: str | None, *, everybody: bool) -> list[dict[str, str]]:
    given = {
        BlockTargetKind.USER: user,
        BlockTargetKind.CONVERSATION: conversation,
        BlockTargetKind.AGENT: agent,
        BlockTargetKind.NAMESPACE: "" if everybody else None,
    }
    return [{"kind": kind.value, "name": name} for kind, name in given.items() if name is not None]


def _required(targets: list[dict[str, str]]) -> list[dict[str, str]]:
    if not targets:
        accepted = "--user, --conversation, --agent or --everybody"
        raise InvalidInput([Problem("", "it is not said what to attach to", accepted)], "command")
    return targets


def _target(one: Mapping[str, str]) -> str:
    return "everybody" if one["kind"] == BlockTargetKind.NAMESPACE else f"{one['kind']} {one['name']}"


def _text(value: str | None, file: str | None) -> str | None:
    """Return the given value. Raises InvalidInput, NotFound."""
    if value is not None and file is not None:
        raise InvalidInput([Problem("--file", "the value is given twice", "--value or --file")], "command")
    if file is None:
        return value
    if file != "-":
        return texts.read(Path(file)).removesuffix("\n")
    raw = sys.stdin.buffer.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise InvalidInput([Problem("-", "the text is too long", f"at most {_MAX_BYTES} bytes")], "input")
    try:
        return raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput([Problem("-", f"it is not UTF-8 text (byte {error.start})")], "input") from None


def _from_editor(value: str) -> str:
    """Return the value as it was saved in $EDITOR. Raises InvalidInput without a terminal, or if nothing was saved."""
    if not sys.stdin.isatty():
        raise InvalidInput([Problem("", "nothing is to be changed", "--value, --file, or a terminal")], "command")
    saved = click.edit(value, extension=".txt")
    if saved is None:
        raise InvalidInput([Problem("", "nothing was saved in the editor")], "value")
    return saved.removesuffix("\n")
