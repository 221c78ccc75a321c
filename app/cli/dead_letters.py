"""`arriero dead-letters`: the invalid messages and keys that workers found in the broker."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, settings_of, table

app = typer.Typer(
    no_args_is_help=True,
    help="Dead letters: messages and keys of the broker that no worker can read.\n\n"
    "Workers store them here and continue. If a message was for a step, the step is published again.\n\n"
    "Example: arriero dead-letters list",
)

#: Most characters of a message in the table.
_WIDTH = 60


@app.command("list")
def list_letters(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most dead letters to list.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/dead-letters", limit=limit)
    if as_json:
        print_json(found)
        return
    printed = table(("at", "queue", "reason", "detail", "bytes", "message"), right=("bytes",))
    for one in found["dead_letters"]:
        # The content is untrusted: it must not control the terminal.
        queue, detail, message = (ascii(one[key])[1:-1] for key in ("queue", "detail", "message"))
        printed.add_row(
            f"{one['at']:.19}", Text(queue), one["reason"], Text(detail), str(one["bytes"]), Text(message[:_WIDTH])
        )
    console().print(printed if printed.row_count else "there are no dead letters")
    if found["kept"] > len(found["dead_letters"]):
        console().print(f"{found['kept']} are stored; --limit lists more, --json prints the beginning of each message")


@app.command()
def clear(context: typer.Context) -> None:
    """Remove all dead letters."""
    with connected(settings_of(context)) as client:
        removed = client.delete("/v1/dead-letters")
    console().print(f"removed {removed['removed']} dead letters")
