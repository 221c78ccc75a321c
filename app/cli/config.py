"""`arriero config`: the settings, and where each came from."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from app.cli.output import AsJson, console, print_json, table
from app.kernel import masking
from app.kernel.errors import NotFound
from app.kernel.secrets import Secrets
from app.kernel.settings import SECRET_PREFIX, Loaded, shown, values_of, variable

app = typer.Typer(
    no_args_is_help=True,
    help="Settings: every value, and where it came from.\n\n"
    "Defaults give way to arriero.toml, that to ARRIERO_… variables, that to the command line.",
)


@app.command()
def show(
    context: typer.Context,
    key: Annotated[
        str | None, typer.Argument(help="Only this setting, or those below it, such as api.port or api.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Print every setting with its value and its origin. Passwords are masked.

    The last column names the variable that would set it. Secrets of steps come last, by their names alone.
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
        value = (
            "-" if row["value"] is None else ", ".join(row["value"]) if isinstance(row["value"], list) else row["value"]
        )
        origin = Text(row["origin"], "dim" if row["origin"] == "default" else "bold")
        printed.add_row(row["key"], "-" if value is None else str(value), origin, Text(row["variable"], "dim"))
    console().print(printed)
