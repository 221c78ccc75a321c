"""`arriero context`: documents of users, of which prompts contain what is relevant."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.cli import texts
from app.cli.client import Client, connected
from app.cli.output import AsJson, ago, console, notes, print_json, print_text, settings_of, table
from app.kernel import clock
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.memory.personal.document import ContextFormat, ContextKind

app = typer.Typer(no_args_is_help=True, help="The personal context: documents of users, for prompts.")

#: The endings of files, and how such files are written.
_FORMATS = {".md": ContextFormat.MARKDOWN, ".markdown": ContextFormat.MARKDOWN, ".json": ContextFormat.JSON}
#: Most files of an import, and most bytes of standard input.
_MAX_FILES, _MAX_BYTES = 10_000, 1024 * 1024

User = Annotated[
    str | None, typer.Option("--user", "-u", help="The name of a user; without it, documents of the whole namespace.")
]
Document = Annotated[
    str,
    typer.Argument(
        metavar="KIND/NAME", help="Such as preferences/tone. Kinds: preferences, projects, knowledge, history."
    ),
]


@app.command("list")
def list_documents(
    context: typer.Context,
    user: Annotated[str | None, typer.Option("--user", "-u", help="Only documents of this user.")] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Only documents of the whole namespace.")] = False,
    kind: Annotated[ContextKind | None, typer.Option(help="Only documents of this kind.")] = None,
    problems: Annotated[
        bool, typer.Option("--problems", help="List files of the watched folder that are no documents, and why.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List documents, the oldest first; or what is wrong with files of the watched folder."""
    with connected(settings_of(context)) as client:
        if problems:
            found = list(_pages(client, "/v1/context/files", "files", problem=True))
        else:
            found = list(_pages(client, "/v1/context", "documents", user=user, shared=shared or None, kind=kind))
    if as_json:
        print_json({"files" if problems else "documents": found})
        return
    now = clock.now()
    printed = table(
        ("file", "read", "problem") if problems else ("user", "document", "title", "version", "from", "changed")
    )
    for row in found:
        if problems:
            printed.add_row(row["path"], ago(row["read_at"], now), row["problem"])
            continue
        document = f"{row['kind']}/{row['name']}{' (always)' if row['always'] else ''}"
        changed = ago(row["updated_at"], now)
        printed.add_row(row["user"] or "-", document, row["title"], str(row["version"]), row["source"], changed)
    console().print(printed)


@app.command()
def show(context: typer.Context, document: Document, user: User = None, as_json: AsJson = False) -> None:
    """Print a document as it was written."""
    with connected(settings_of(context)) as client:
        found = client.get(_path(document), user=user)
    if as_json:
        print_json(found)
    else:
        print_text(found["content"])


@app.command()
def put(
    context: typer.Context,
    document: Document,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Markdown or JSON (.json); - for standard input.")],
    user: User = None,
    is_json: Annotated[bool, typer.Option("--as-json", help="Standard input is JSON.")] = False,
    version: Annotated[
        int | None, typer.Option(min=0, help="The version that it replaces, 0 for none; another one is refused.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store a document, in the place of one with the same name."""
    if file == "-":
        content, format_ = _stdin(), ContextFormat.JSON if is_json else ContextFormat.MARKDOWN
    else:
        content, format_ = texts.read(Path(file)), _FORMATS.get(Path(file).suffix.lower(), ContextFormat.MARKDOWN)
    with connected(settings_of(context)) as client:
        stored = _put(client, document, user, content, format_, version)
    if as_json:
        print_json(stored)
    else:
        typer.echo(f"{stored['kind']}/{stored['name']} is at version {stored['version']}")


@app.command()
def rm(context: typer.Context, document: Document, user: User = None) -> None:
    """Delete a document."""
    with connected(settings_of(context)) as client:
        client.delete(_path(document), **({} if user is None else {"user": user}))
    typer.echo(f"{document} is deleted")


@app.command("import")
def import_folder(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="With files KIND/NAME.md or KIND/NAME.json.")],
    user: User = None,
) -> None:
    """
    Store the files of a folder once. A bad file stops no other; with any, the command exits with 2.

    To have a folder watched, set `context.folder`.
    """
    if not folder.is_dir():
        raise NotFound("folder", str(folder))
    refused = stored = 0
    with connected(settings_of(context)) as client:
        for file in _files(folder):
            name = f"{file.parent.name}/{file.stem}"
            try:
                _put(client, name, user, texts.read(file), _FORMATS[file.suffix.lower()], None)
                stored += 1
            except InvalidInput as error:
                refused += 1
                for problem in error.problems:
                    notes().print(f"{file}: {problem}", markup=False, style="red")
            except NotFound as error:
                refused += 1
                notes().print(f"{file}: {error}", markup=False, style="red")
    typer.echo(f"{stored} document(s) stored, {refused} file(s) refused")
    if refused:
        raise typer.Exit(2)


@app.command()
def relevant(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="What a prompt is about.")],
    user: User = None,
    limit: Annotated[int, typer.Option("-n", min=0, max=50, help="Most parts that are found.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Print the parts of documents that a prompt about something contains, with their scores."""
    body = {"query": query, "limit": limit, **({} if user is None else {"user": user})}
    with connected(settings_of(context)) as client:
        found = client.post("/v1/context/relevant", body)
    if as_json:
        print_json(found)
        return
    for part in found["parts"]:
        score = "always" if part["score"] is None else f"{part['score']:.3f}"
        notes().print(f"{score}  {part['kind']}/{part['name']}  {part['heading']}", style="dim", markup=False)
        print_text(part["text"])


def _pages(client: Client, path: str, name: str, **parameters: Any) -> Iterator[dict[str, Any]]:
    cursor = None
    while True:
        found = client.get(path, cursor=cursor, **parameters)
        yield from found[name]
        cursor = found["next_cursor"]
        if cursor is None:
            return


def _path(document: str) -> str:
    """Return the path of a document. Raises InvalidInput."""
    kind, mark, name = document.partition("/")
    if not mark or not name or kind not in {one.value for one in ContextKind}:
        accepted = f"KIND/NAME with one of the kinds {', '.join(ContextKind)}"
        raise InvalidInput([Problem("KIND/NAME", f"{document!r} names no document", accepted)], "argument")
    return f"/v1/context/{kind}/{quote(name, safe='')}"


def _put(
    client: Client, document: str, user: str | None, content: str, format_: ContextFormat, version: int | None
) -> dict[str, Any]:
    body = {"content": content, "format": format_.value, "version": version}
    return dict(client.put(_path(document), body, user=user))


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of the folders of kinds. Links and hidden files are passed over."""
    found = 0
    for inner in sorted(folder.iterdir()):
        if not inner.is_dir() or inner.is_symlink() or inner.name.startswith("."):
            continue
        for file in sorted(inner.iterdir()):
            if file.suffix.lower() not in _FORMATS or file.is_symlink() or file.name.startswith("."):
                continue
            found += 1
            if found > _MAX_FILES:
                raise InvalidInput([Problem("FOLDER", f"it has more than {_MAX_FILES} files")], "folder")
            yield file


def _stdin() -> str:
    raw = sys.stdin.buffer.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise InvalidInput([Problem("-", "the text is too long", f"at most {_MAX_BYTES} bytes")], "input")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput([Problem("-", f"it is not UTF-8 text (byte {error.start})")], "input") from None
