"""`arriero dead-letters`: what workers found in the broker and could not read."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, settings_of, table

app = typer.Typer(
    no_args_is_help=True,
    help="Dead letters: messages and keys of the broker that no worker can read.\n\n"
    "Workers put them aside and go on; the steps that were meant are done all the same.\n\n"
    "Example: arriero dead-letters list",
)

#: Characters of a message in the table.
_SHOWN = 60


@app.command("list")
def list_letters(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at the most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List them, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/dead-letters", limit=limit)
    if as_json:
        print_json(found)
        return
    printed = table(("at", "queue", "reason", "detail", "bytes", "message"), right=("bytes",))
    for one in found["dead_letters"]:
        # Somebody else wrote all of it: nothing of it steers the terminal.
        queue, detail, message = (ascii(one[key])[1:-1] for key in ("queue", "detail", "message"))
        printed.add_row(
            f"{one['at']:.19}", Text(queue), one["reason"], Text(detail), str(one["bytes"]), Text(message[:_SHOWN])
        )
    console().print(printed if printed.row_count else "there are no dead letters")
    if found["kept"] > len(found["dead_letters"]):
        console().print(f"{found['kept']} are kept; --limit shows more, --json each message's beginning")


@app.command()
def clear(context: typer.Context) -> None:
    """Remove all that are kept."""
    with connected(settings_of(context)) as client:
        removed = client.delete("/v1/dead-letters")
    console().print(f"removed {removed['removed']} dead letters")
