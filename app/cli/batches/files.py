"""`arriero files`: upload, list, read, delete."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.text import Text

from app.cli.client import Client, connected
from app.cli.output import AsJson, ago, console, notes, print_json, settings_of, table
from app.files.file import FilePurpose
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security.texts import printable
from app.kernel.units import sizes

app = typer.Typer(no_args_is_help=True, help="Files: inputs of batches, their results, and data of users.")

FileId = Annotated[str, typer.Argument(metavar="ID", help="Id of the file: file-…")]
#: An option of every command that reads a list page by page.
PageSize = Annotated[int, typer.Option("--limit", min=1, max=1000, help="Number of rows.")]
AfterId = Annotated[str | None, typer.Option(help="Continue the list after this id.")]


@app.command()
def upload(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The file.", exists=True, dir_okay=False, readable=True)],
    purpose: Annotated[FilePurpose, typer.Option(help="batch or user_data.")] = FilePurpose.BATCH,
    as_json: AsJson = False,
) -> None:
    """Upload a file and print its id."""
    with connected(settings_of(context)) as client:
        made = upload_file(client, file, purpose)
    print_json(made) if as_json else typer.echo(made["id"])


def upload_file(client: Client, file: Path, purpose: FilePurpose) -> Any:
    """Upload a file, which is read as it is sent. Returns the answer. Raises InvalidInput when it cannot be read."""
    try:
        with file.open("rb") as content:
            return client.upload("/v1/files", file.name, content, {"purpose": purpose.value})
    except OSError as error:
        raise InvalidInput([Problem(str(file), f"the file cannot be read: {error}")], "file") from None


@app.command("list")
def list_(
    context: typer.Context,
    purpose: Annotated[FilePurpose | None, typer.Option(help="Only files with this purpose.")] = None,
    limit: PageSize = 50,
    after: AfterId = None,
    as_json: AsJson = False,
) -> None:
    """List the files, the newest first."""
    with connected(settings_of(context)) as client:
        parameters = {"purpose": purpose and purpose.value, "limit": limit, "after": after}
        page = client.get("/v1/files", **parameters)
    if as_json:
        print_json(page)
        return
    now = clock.now()
    printed = table(("file", "name", "purpose", "size", "created", "expires"), right=("size",))
    for file in page["data"]:
        size, created = sizes.rounded(file["bytes"]), passed(file["created_at"], now)
        name, expires = plain(file["filename"]), at(file["expires_at"])
        printed.add_row(file["id"], name, file["purpose"], size, created, expires)
    console().print(printed) if page["data"] else notes().print("no files")
    if page["has_more"]:
        notes().print(f"more: arriero files list --after {page['last_id']}")


@app.command()
def show(context: typer.Context, file_id: FileId) -> None:
    """Show a file, without its content, as JSON."""
    with connected(settings_of(context)) as client:
        print_json(client.get(f"/v1/files/{file_id}"))


@app.command()
def content(
    context: typer.Context,
    file_id: FileId,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
) -> None:
    """Print the content of a file, or write it to another one."""
    with connected(settings_of(context)) as client:
        if output is None:
            copy(client, file_id, sys.stdout.buffer)
            return
        with output.open("wb") as target:
            copy(client, file_id, target)
    notes().print(f"written to {output}", markup=False)


def copy(client: Client, file_id: str, target: BinaryIO) -> None:
    """Write the content of a file, part by part."""
    with client.download(f"/v1/files/{file_id}/content") as parts:
        for part in parts:
            target.write(part)
    target.flush()


@app.command()
def delete(context: typer.Context, file_id: FileId) -> None:
    """Delete a file with its content."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/files/{file_id}")
    typer.echo(f"{file_id} is deleted")


def at(seconds: int | None) -> str:
    """Format an instant of OpenAI's API for people."""
    return "-" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def passed(seconds: int | None, now: datetime) -> str:
    """Format the time since an instant of OpenAI's API."""
    return "-" if seconds is None else ago(datetime.fromtimestamp(seconds, UTC).isoformat(), now)


def plain(text: str) -> Text:
    """Return a text of a user for a table, harmless at a terminal."""
    return Text(printable(text))
