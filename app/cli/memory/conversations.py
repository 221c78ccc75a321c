"""`arriero conversations`: list, show, create, append, search, export, fork, delete, and how long they are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from app.access.namespaces import DEFAULT
from app.cli.client import Client, connected
from app.cli.output import AsJson, ago, console, notes, print_json, print_text, settings_of, table
from app.kernel import clock
from app.kernel.errors import ArrieroError, InvalidInput, Problem
from app.kernel.security.texts import printable
from app.memory.conversations.export import ExportFormat
from app.memory.conversations.message import MessageRole

app = typer.Typer(
    no_args_is_help=True,
    help="Conversations: what was said, to read, search, continue and delete.\n\n"
    'Example: arriero conversations create --user ada --title "Tea" "What is green tea?"',
)

_PATH = "/v1/conversations"
#: Messages that one request appends.
_PART = 500

_Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the conversation: conv_…")]
_User = Annotated[str | None, typer.Option(help="The user whose long-term memory it shares.")]
_Metadata = Annotated[
    list[str] | None, typer.Option("--metadata", help="An entry as key:value; may be repeated.", metavar="KEY:VALUE")
]
_Limit = Annotated[int, typer.Option("--limit", min=1, max=100, help="Number of rows.")]


class NotProved(ArrieroError):
    """A deletion was done, but a search could not show that nothing is left."""


@app.command("list")
def list_(
    context: typer.Context,
    user: Annotated[str | None, typer.Option(help="Only those of this user.")] = None,
    metadata: _Metadata = None,
    title: Annotated[str | None, typer.Option(help="Only those with this in their title.")] = None,
    since: Annotated[str | None, typer.Option(help="Created at or after this time, such as 2026-11-22T10:00Z.")] = None,
    until: Annotated[str | None, typer.Option(help="Created before this time.")] = None,
    limit: _Limit = 20,
    after: Annotated[str | None, typer.Option(help="Continue the list after this id.")] = None,
    as_json: AsJson = False,
) -> None:
    """List conversations, the newest first."""
    parameters = {"user": user, "metadata": metadata, "title": title, "since": since, "until": until}
    with connected(settings_of(context)) as client:
        page = client.get(_PATH, **parameters, limit=limit, after=after)
    if as_json:
        print_json(page)
        return
    now = clock.now()
    printed = table(("conversation", "user", "title", "messages", "last message"), right=("messages",))
    for one in page["data"]:
        last = ago(datetime.fromtimestamp(one["updated_at"], UTC).isoformat(), now)
        printed.add_row(one["id"], _plain(one["user"]), _plain(one["title"]), str(one["messages"]), last)
    console().print(printed) if page["data"] else notes().print("no conversations")
    if page["has_more"]:
        notes().print(f"more: arriero conversations list --after {page['last_id']}")


@app.command()
def show(
    context: typer.Context,
    conversation_id: _Id,
    last: Annotated[int, typer.Option("--last", min=0, max=100, help="Number of last messages to print.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show a conversation with its last messages."""
    with connected(settings_of(context)) as client:
        found = client.get(_of(conversation_id))
        messages = client.get(_of(conversation_id, "messages"), order="desc", limit=last)["data"] if last else []
    if as_json:
        print_json({**found, "last_messages": messages[::-1]})
        return
    about = {name: found[name] for name in ("title", "user", "model", "namespace", "retention", "forked_from")}
    facts = [f"{name.replace('_', ' ')} {printable(str(value))}" for name, value in about.items() if value is not None]
    print_text(f"{found['id']}: {found['messages']} messages; {', '.join(facts)}")
    for message in messages[::-1]:
        speaker = f"{message['name']} ({message['role']})" if message.get("name") else message["role"]
        calls = [f"[calls {call['function']['name']} {call['function']['arguments']}]" for call in _calls(message)]
        print_text(
            printable(f"\n#{message['seq']} {speaker}\n" + "\n".join(filter(None, [message["content"], *calls])))
        )


@app.command()
def create(
    context: typer.Context,
    text: Annotated[str | None, typer.Argument(help="The first message of the user.")] = None,
    user: _User = None,
    title: Annotated[str | None, typer.Option(help="Its title.")] = None,
    metadata: _Metadata = None,
    model: Annotated[str | None, typer.Option(help="The model that answers, unless a request names another.")] = None,
    retention: Annotated[
        str | None,
        typer.Option(help="It is deleted this long after its last message: '30d'; by default, see retention."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a conversation and print its id."""
    body: dict[str, Any] = {"user": user, "title": title, "model": model, "retention": retention}
    body = {name: value for name, value in body.items() if value is not None}
    body["metadata"] = _pairs(metadata or ())
    if text is not None:
        body["items"] = [{"type": "message", "role": "user", "content": text}]
    with connected(settings_of(context)) as client:
        made = client.post(_PATH, body)
    print_json(made) if as_json else typer.echo(made["id"])


@app.command()
def append(
    context: typer.Context,
    conversation_id: _Id,
    text: Annotated[str | None, typer.Argument(help="What is said; '-' reads standard input.")] = None,
    role: Annotated[MessageRole, typer.Option(help="Who says it.")] = MessageRole.USER,
    name: Annotated[str | None, typer.Option(help="The name of the speaker.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("-f", "--file", help="Append the messages of a file of JSON Lines, as `export` writes it."),
    ] = None,
) -> None:
    """Append a message, or those of a file, and print how many there were."""
    if (text is None) == (file is None):
        raise InvalidInput([Problem("TEXT", "one of TEXT and --file must be given", "a text, or a file")], "arguments")
    said = sys.stdin.read() if text == "-" else text
    messages = _read(file) if file is not None else [{"role": role.value, "content": said, "name": name}]
    count = 0
    with connected(settings_of(context)) as client:
        for part in _parts(messages):
            count += len(client.post(_of(conversation_id, "messages"), {"messages": part})["data"])
    typer.echo(f"{count} appended")


@app.command()
def search(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    conversation: Annotated[str | None, typer.Option(help="Only in this conversation.")] = None,
    user: Annotated[str | None, typer.Option(help="Only in conversations of this user.")] = None,
    role: Annotated[list[MessageRole] | None, typer.Option(help="Only what this role said; may be repeated.")] = None,
    limit: _Limit = 10,
    as_json: AsJson = False,
) -> None:
    """Search messages by their words and their meaning, the best first."""
    if conversation is not None and user is not None:
        raise InvalidInput([Problem("--user", "a conversation has one user", "one of the options")], "arguments")
    path = f"{_PATH}/search" if conversation is None else _of(conversation, "search")
    with connected(settings_of(context)) as client:
        found = client.get(path, q=query, user=user, role=[one.value for one in role or ()] or None, limit=limit)
    if as_json:
        print_json(found)
        return
    printed = table(("conversation", "#", "role", "score", "text"), right=("#", "score"))
    for one in found["data"]:
        text = " ".join(one["text"].split())
        printed.add_row(one["conversation"], str(one["seq"]), one["role"], f"{one['score']:.2f}", _plain(text[:200]))
    console().print(printed) if found["data"] else notes().print("nothing found")
    if not found["dense"]["used"]:
        notes().print(f"searched by words alone: {found['dense']['reason']}", markup=False)


@app.command()
def export(
    context: typer.Context,
    conversation_id: _Id,
    form: Annotated[ExportFormat, typer.Option("--format", help="jsonl or markdown.")] = ExportFormat.JSONL,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
) -> None:
    """Print all messages of a conversation, or write them to a file."""
    path = f"{_of(conversation_id, 'export')}?format={form.value}"
    with connected(settings_of(context)) as client, client.download(path) as parts:
        if output is None:
            for part in parts:
                sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()
            return
        with output.open("wb") as target:
            for part in parts:
                target.write(part)
    notes().print(f"written to {output}", markup=False)


@app.command()
def fork(
    context: typer.Context,
    conversation_id: _Id,
    at: Annotated[
        str | None, typer.Option(help="Number or id of the last message of the fork. By default the last one.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Its title; by default that of the first.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create a conversation with the messages of another one up to a message, and print its id."""
    with connected(settings_of(context)) as client:
        made = client.post(_of(conversation_id, "fork"), {"at": at, "title": title})
    print_json(made) if as_json else typer.echo(made["id"])


@app.command()
def delete(
    context: typer.Context,
    conversation_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Ids of conversations: conv_…")
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(help="Delete everything of a user: conversations, memories, blocks, documents, runs."),
    ] = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete conversations, or everything of a user, for real, and print what a search finds afterwards."""
    if bool(conversation_ids) == (user is not None):
        raise InvalidInput([Problem("ID", "one of ID and --user must be given", "ids, or a user")], "arguments")
    if not yes:
        what = f"everything of the user {user!r}" if user is not None else ", ".join(conversation_ids or ())
        typer.confirm(f"Delete {printable(what)} for ever?", abort=True, err=True)
    with connected(settings_of(context), timeout=600.0) as client:
        if user is not None:
            _report(user, client.delete(f"/v1/users/{quote(user, safe='')}/memory"), as_json=as_json)
        for id_ in conversation_ids or ():
            _report(id_, client.delete(_of(id_)), as_json=as_json)


@app.command()
def retention(
    context: typer.Context,
    namespace: Annotated[str, typer.Argument(help="The namespace.")] = DEFAULT,
    set_: Annotated[
        str | None,
        typer.Option("--set", help="Keep conversations this long after their last message: '90d', or 'forever'."),
    ] = None,
    unset: Annotated[bool, typer.Option("--unset", help="Return to the setting conversations.retention.")] = False,
) -> None:
    """Show or change for how long a namespace keeps its conversations."""
    if set_ is not None and unset:
        raise InvalidInput([Problem("--unset", "it contradicts --set", "one of them")], "arguments")
    path = f"/v1/namespaces/{quote(namespace, safe='')}/retention"
    with connected(settings_of(context)) as client:
        found = _changed(client, path, set_, unset=unset)
    kept = "until they are deleted" if found["conversations"] is None else f"for {found['conversations']}"
    typer.echo(f"{found['namespace']}: conversations are kept {kept} ({found['origin']})")


def _changed(client: Client, path: str, set_: str | None, *, unset: bool) -> Any:
    if set_ is not None:
        return client.put(path, {"conversations": None if set_ == "forever" else set_})
    return client.delete(path) if unset else client.get(path)


def _report(what: str, proof: Any, *, as_json: bool) -> None:
    """Print what was deleted. Raises NotProved."""
    if as_json:
        print_json(proof)
    else:
        removed = ", ".join(f"{count} {name}" for name, count in proof["removed"].items()) or "nothing was stored"
        print_text(printable(f"{what} is deleted: {removed}"))
        if proof["proved"]:
            print_text(f"proof: a search in {', '.join(proof['left'])} finds nothing")
    if not proof["proved"]:
        left = [f"{count} {name}" for name, count in proof["left"].items() if count]
        raise NotProved("; ".join([*(["the search finds " + ", ".join(left)] if left else []), *proof["notes"]]))


def _of(conversation_id: str, *more: str) -> str:
    return "/".join((_PATH, quote(conversation_id, safe=""), *more))


def _calls(message: Any) -> Iterable[Any]:
    return message.get("tool_calls") or ()


def _pairs(given: Iterable[str]) -> dict[str, str]:
    """Raises InvalidInput."""
    found = {}
    for one in given:
        name, colon, value = one.partition(":")
        if not colon:
            raise InvalidInput([Problem("--metadata", f"{one!r} has no colon", "KEY:VALUE")], "arguments")
        found[name] = value
    return found


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the messages of a file, line by line. Raises InvalidInput."""
    try:
        with file.open(encoding="utf-8") as content:
            for number, line in enumerate(content, start=1):
                if line.strip():
                    yield _message(file, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput([Problem(str(file), f"the file cannot be read: {error}")], "file") from None


def _message(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput([Problem(str(file), f"no JSON: {error}", "a message", number)], "file") from None
    if not isinstance(found, dict):
        raise InvalidInput([Problem(str(file), "no JSON object", "a message", number)], "file")
    return found


def _parts(messages: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for message in messages:
        part.append({name: value for name, value in message.items() if value is not None})
        if len(part) == _PART:
            yield part
            part = []
    if part:
        yield part


def _plain(text: str | None) -> Text:
    """Return a text of a user for a table, harmless at a terminal."""
    return Text("-" if text is None else printable(text))
