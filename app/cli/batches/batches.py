"""`arriero batches`: the requests of a file, done while models are idle."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from app.cli.batches.files import AfterId, PageSize, at, copy, passed, plain, upload_file
from app.cli.client import Client, connected
from app.cli.output import AsJson, console, live, notes, print_json, settings_of, state, table
from app.files.file import FilePurpose
from app.inference.batches.batch import OPEN_BATCHES
from app.kernel import clock
from app.kernel.errors import Conflict, InvalidInput, Problem
from app.kernel.security.texts import printable

app = typer.Typer(no_args_is_help=True, help="Batches: the requests of a file, done while models are idle.")

BatchId = Annotated[str, typer.Argument(metavar="ID", help="Id of the batch: batch_…")]

#: Seconds between two looks at a batch that is waited for.
_INTERVAL = 1.0
#: The bytes in which the first line of a file is looked for.
_FIRST_LINE = 1024 * 1024


@app.command()
def create(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE|ID", help="A JSON Lines file, or the id of an uploaded one.")],
    endpoint: Annotated[
        str | None, typer.Option(help="The endpoint of its requests; by default the url of the first line.")
    ] = None,
    window: Annotated[str, typer.Option(help="The time for all its requests: 30m, 24h, 7d.")] = "24h",
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until it has ended; exits with 1 if not completed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a file and begin its batch. Prints the id."""
    path = Path(file)
    is_uploaded = file.startswith("file-") and not path.exists()
    if endpoint is None:
        endpoint = "/v1/chat/completions" if is_uploaded else _endpoint_of(path)
    with connected(settings_of(context)) as client:
        file_id = file if is_uploaded else upload_file(client, path, FilePurpose.BATCH)["id"]
        body = {
            "input_file_id": file_id,
            "endpoint": endpoint,
            "completion_window": window,
            "metadata": dict(_pair(one) for one in metadata or ()) or None,
        }
        found = client.post("/v1/batches", body)
        if not as_json:
            typer.echo(found["id"])
        if wait:
            found = _wait(client, found["id"])
    if as_json:
        print_json(found)
    elif wait:
        _print_end(found)
    if wait and found["status"] != "completed":
        raise typer.Exit(1)


@app.command("list")
def list_(context: typer.Context, limit: PageSize = 20, after: AfterId = None, as_json: AsJson = False) -> None:
    """List the batches, the newest first."""
    with connected(settings_of(context)) as client:
        page = client.get("/v1/batches", limit=min(limit, 100), after=after)
    if as_json:
        print_json(page)
        return
    now = clock.now()
    printed = table(
        ("batch", "state", "done", "failed", "total", "endpoint", "created"), right=("done", "failed", "total")
    )
    for batch in page["data"]:
        counts = (str(batch["request_counts"][name]) for name in ("completed", "failed", "total"))
        printed.add_row(
            batch["id"], state(batch["status"]), *counts, batch["endpoint"], passed(batch["created_at"], now)
        )
    console().print(printed) if page["data"] else notes().print("no batches")
    if page["has_more"]:
        notes().print(f"more: arriero batches list --after {page['last_id']}")


@app.command()
def show(context: typer.Context, batch_id: BatchId, as_json: AsJson = False) -> None:
    """Show a batch: its state, its progress, what is wrong with its file."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/batches/{batch_id}")
    if as_json:
        print_json(found)
    else:
        _print(found, clock.now())


@app.command()
def cancel(
    context: typer.Context,
    batch_id: BatchId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until its requests have stopped.")] = False,
) -> None:
    """Cancel a batch. What is done stays in its results."""
    with connected(settings_of(context)) as client:
        found = client.post(f"/v1/batches/{batch_id}/cancel")
        if wait and found["status"] in OPEN_BATCHES:
            found = _wait(client, batch_id)
    typer.echo(f"{batch_id} is {found['status']}")


@app.command()
def results(
    context: typer.Context,
    batch_id: BatchId,
    errors: Annotated[bool, typer.Option("--errors", help="The requests that failed or were not done.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
) -> None:
    """Print the results of a batch that has ended, one JSON document a line."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/batches/{batch_id}")
        if found["status"] in OPEN_BATCHES:
            raise Conflict(f"the batch {batch_id} is {found['status']}: there are no results yet")
        file_id = found["error_file_id" if errors else "output_file_id"]
        if file_id is None:
            notes().print("no request failed" if errors else "no request was answered")
        elif output is None:
            copy(client, file_id, sys.stdout.buffer)
        else:
            with output.open("wb") as target:
                copy(client, file_id, target)
            notes().print(f"written to {output}", markup=False)
        if not errors and found["error_file_id"] is not None:
            notes().print(f"some requests have no answer: arriero batches results {batch_id} --errors")


def _endpoint_of(path: Path) -> str:
    """Return the url of the first line of a file. Raises InvalidInput."""
    from app.inference.batches.validation import InvalidLine, parse_line

    try:
        with path.open("rb") as file:
            found = parse_line(file.readline(_FIRST_LINE)).get("url")
    except OSError as error:
        raise InvalidInput([Problem(str(path), f"the file cannot be read: {error}")], "file") from None
    except InvalidLine as error:
        raise InvalidInput([Problem(str(path), str(error), "", 1)], "file") from None
    if not isinstance(found, str):
        problem = Problem(str(path), "the first line has no 'url'", 'a line such as {"custom_id": …, "url": …}', 1)
        raise InvalidInput([problem], "file")
    return found


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise InvalidInput([Problem("--metadata", f"{text!r} has no =", "KEY=VALUE")], "command line")
    return name, value


def _wait(client: Client, batch_id: str) -> Any:
    """Return the batch when it has ended. At a terminal, its progress is shown."""
    pause, shown = threading.Event(), live()
    with shown.status("waiting") as status:
        while True:
            found = client.get(f"/v1/batches/{batch_id}")
            if found["status"] not in OPEN_BATCHES:
                return found
            status.update(f"{found['status']}: {_counts(found)}")
            pause.wait(_INTERVAL)


def _counts(found: Mapping[str, Any]) -> str:
    counts = found["request_counts"]
    return f"{counts['completed']} of {counts['total']} done, {counts['failed']} failed"


def _print_end(found: Mapping[str, Any]) -> None:
    notes().print(f"{found['status']}: {_counts(found)}")
    for error in (found["errors"] or {"data": []})["data"][:10]:
        where = "" if error["line"] is None else f"line {error['line']}: "
        notes().print(f"{where}{error['message']}", markup=False)


def _print(found: Mapping[str, Any], now: datetime) -> None:
    moments = ("in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled")
    lines = [
        ("state", found["status"]),
        ("requests", _counts(found)),
        ("endpoint", found["endpoint"]),
        ("model", found["model"] or "-"),
        ("input", found["input_file_id"]),
        ("output", found["output_file_id"] or "-"),
        ("errors", found["error_file_id"] or "-"),
        ("window", f"{found['completion_window']}, until {at(found['expires_at'])} UTC"),
        ("created", passed(found["created_at"], now)),
        *((name, passed(found[f"{name}_at"], now)) for name in moments if found[f"{name}_at"]),
        *((f"metadata.{printable(name)}", value) for name, value in (found["metadata"] or {}).items()),
        ("run", found["run_id"]),
    ]
    printed = table(("batch", found["id"]))
    for name, value in lines:
        printed.add_row(escape(name), plain(value))
    console().print(printed)
    if found["errors"]:
        problems = table(("line", "code", "field", "problem"), right=("line",))
        for error in found["errors"]["data"]:
            problems.add_row(
                str(error["line"] or "-"), error["code"], plain(error["param"] or ""), plain(error["message"])
            )
        console().print(problems)
