"""`arriero config`: the settings and their origins."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.text import Text

from app.cli.output import AsJson, console, print_json, table
from app.kernel.errors import NotFound
from app.kernel.security import masking
from app.kernel.security.secrets import Secrets
from app.kernel.settings import SECRET_PREFIX, Loaded, shown, values_of, variable

app = typer.Typer(
    no_args_is_help=True,
    help="Settings: every value and its origin.\n\n"
    "Values come from the defaults, arriero.toml, ARRIERO_… variables and the command line; the later ones win.",
)


@app.command()
def show(
    context: typer.Context,
    key: Annotated[
        str | None, typer.Argument(help="Only this setting or this group of settings, such as api.port or api.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Print every setting with its value and its origin. Passwords are masked.

    The last column is the environment variable of the setting. Secrets of steps are listed last, by name only.
    """
    loaded: Loaded = context.obj
    every = [
        {"key": name, "value": shown(value), "origin": loaded.origins[name], "variable": variable(name)}
        for name, value in values_of(loaded.settings)
    ]
    every += [
        {"key": f"secrets.{name}", "value": masking.MASK, "origin": origin, "variable": SECRET_PREFIX + name.upper()}
        for name, origin in Secrets(loaded.settings.secrets_dir).origins()
    ]
    rows = [row for row in every if key is None or row["key"] == key or row["key"].startswith(f"{key}.")]
    if not rows:
        raise NotFound("setting", str(key), [row["key"] for row in every])
    if as_json:
        print_json(rows)
        return
    printed = table(("setting", "value", "from", "variable"))
    for row in rows:
        value = ", ".join(map(_item, row["value"])) if isinstance(row["value"], list) else row["value"]
        origin = Text(row["origin"], "dim" if row["origin"] == "default" else "bold")
        printed.add_row(row["key"], "-" if value is None else str(value), origin, Text(row["variable"], "dim"))
    console().print(printed)


def _item(value: Any) -> str:
    """Return the text of an item of a list."""
    return json.dumps(value) if isinstance(value, dict) else str(value)
