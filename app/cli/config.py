"""`arriero config`: the settings and their origins, and changes while the processes run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from app.cli.client import connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, shortened, table
from app.cli.processes import records
from app.kernel import settings as all_settings
from app.kernel.errors import ArrieroError, NotFound, Unavailable
from app.kernel.security import masking
from app.kernel.security.secrets import Secrets
from app.kernel.settings import SECRET_PREFIX, Loaded, Settings, shown, values_of, variable

#: Seconds within which the API says which settings were changed.
_PATIENCE = 3.0

app = typer.Typer(
    no_args_is_help=True,
    help="Settings: every value and its origin; and those that change while the processes run.\n\n"
    "Values come from the defaults, arriero.toml, ARRIERO_… variables and the command line; the later ones win. "
    "Run-time values (`set`) win over all of these, in every process, until they are removed or reverted.",
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

    The last column is the environment variable of the setting. Secrets of steps are listed last, by name only. A value
    that was changed while the processes run is shown if the API answers, with its version.
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
    changed = _run_time(loaded.settings)
    every = [row | changed.get(row["key"], {}) for row in every]
    rows = [row for row in every if key is None or row["key"] == key or row["key"].startswith(f"{key}.")]
    if not rows:
        raise NotFound("setting", str(key), [row["key"] for row in every])
    if as_json:
        print_json(rows)
        return
    printed = table(("setting", "value", "from", "variable"))
    for row in rows:
        origin = Text(row["origin"], "dim" if row["origin"] == "default" else "bold")
        printed.add_row(row["key"], _text(row["value"]), origin, Text(row["variable"], "dim"))
    console().print(printed)


_Reason = Annotated[str, typer.Option("--reason", "-m", help="Why, for the history.")]


@app.command("set")
def set_(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="A setting, such as runs.retention.")],
    value: Annotated[str, typer.Argument(help="Its value; a list is written as a,b,c.")],
    reason: _Reason,
    as_json: AsJson = False,
) -> None:
    """
    Change a setting while the processes run. It holds everywhere within seconds, until `unset` or `revert`.

    `arriero config changeable` lists the settings for which this is possible.
    """
    _change(context, {"settings": {key: value}, "reason": reason}, as_json=as_json)


@app.command()
def unset(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="A setting that was changed with `set`.")],
    reason: _Reason,
    as_json: AsJson = False,
) -> None:
    """Remove a run-time value, so that the value of the file, the variable or the default holds again."""
    _change(context, {"settings": {key: None}, "reason": reason}, as_json=as_json)


@app.command()
def changeable(as_json: AsJson = False) -> None:
    """List the settings that can change while the processes run."""
    keys = all_settings.changeable()
    if as_json:
        print_json(list(keys))
        return
    printed = table(("setting", "default"))
    for key in keys:
        printed.add_row(key, _text(shown(all_settings.default_of(key))))
    console().print(printed)


@app.command()
def history(
    context: typer.Context,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=200, help="Most versions.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the versions of the run-time values, the newest first: what changed, who did it, when and why."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/admin/settings/history", limit=limit)
    if as_json:
        print_json(found)
        return
    printed = table(("version", "at", "author", "change", "reason"), right=("version",))
    for one in found["versions"]:
        _add(printed, one)
    console().print(printed if printed.row_count else "no setting has been changed while the processes run")


@app.command()
def revert(
    context: typer.Context,
    version: Annotated[int, typer.Argument(min=0, help="A version of `history`; 0 removes all run-time values.")],
    reason: _Reason,
    as_json: AsJson = False,
) -> None:
    """Make the run-time values of an earlier version hold again, as a new version."""
    with connected(settings_of(context)) as client:
        found = client.post("/v1/admin/settings/revert", {"version": version, "reason": reason})
    _print_version(found, as_json=as_json)


def _change(context: typer.Context, body: Mapping[str, Any], *, as_json: bool) -> None:
    with connected(settings_of(context)) as client:
        found = client.patch("/v1/admin/settings", body)
    _print_version(found, as_json=as_json)


def _print_version(found: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    printed = table(("version", "at", "author", "change", "reason"), right=("version",))
    _add(printed, found)
    console().print(printed)


def _add(printed: Table, one: Mapping[str, Any]) -> None:
    changes = [f"{key}: {_text(change['before'])} → {_text(change['now'])}" for key, change in one["changes"].items()]
    reason = one["reason"] + ("" if one["reverted_to"] is None else f" (version {one['reverted_to']} again)")
    at = f"{one['created_at'] or '-':.19}"
    printed.add_row(
        str(one["version"]), at, shortened(one["author"]), shortened("; ".join(changes), 300), shortened(reason)
    )


def _run_time(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return value and origin of the settings that were changed while the processes run; none without an API."""
    if not (settings.api.url or settings.database_url or records.running(settings.data_dir)):
        return {}  # what answers at the default address would belong to another installation
    try:
        with connected(settings, timeout=_PATIENCE) as client:
            found = client.get("/v1/admin/settings")["settings"]
    except ArrieroError as error:
        if not isinstance(error, Unavailable):
            notes().print(f"run-time values are not shown: {error}", style="dim", markup=False)
        return {}
    return {
        one["key"]: {"value": one["value"], "origin": one["origin"]}
        for one in found
        if one["origin"].startswith("run time")
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(_item, value)) if isinstance(value, list) else str(value)


def _item(value: Any) -> str:
    """Return the text of an item of a list."""
    return json.dumps(value) if isinstance(value, dict) else str(value)
