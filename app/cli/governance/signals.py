"""`arriero signals`: what is measured, now and over time."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer

from app.cli.client import connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, table
from app.governance.rules.evaluation import shown
from app.governance.signals.names import Unit

app = typer.Typer(no_args_is_help=True, help="Signals: what is measured, now and over time.")


@app.command("list")
def list_signals(context: typer.Context, as_json: AsJson = False) -> None:
    """List signals, each with its value over the last five minutes."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/signals")
    if as_json:
        print_json(found)
        return
    printed = table(("signal", "now", "statistic", "labels", "description"))
    for row in found["signals"]:
        value = "-" if row["value"] is None else _shown(row["value"], row)
        printed.add_row(row["name"], value, row["statistics"][0], ", ".join(row["labels"]), row["description"])
    console().print(printed)


@app.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of a signal.")],
    window: Annotated[str, typer.Option(help="The time until now, such as 1h or 7d.")] = "1h",
    by: Annotated[str | None, typer.Option(help="A value for each model, pool, host, device, namespace.")] = None,
    statistic: Annotated[str | None, typer.Option(help="Of the points: mean, max, p95 and others.")] = None,
    points: Annotated[bool, typer.Option("--points", help="Print a line for each minute, hour or day.")] = False,
    resolution: Annotated[str | None, typer.Option(help="Of the points: minute, hour or day.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the statistics of a signal in a window, and its points."""
    given = {"window": window, "by": by, "statistic": statistic, "resolution": resolution}
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/signals/{name}", **given)
    if as_json:
        print_json(found)
        return
    if not found["values"]:
        notes().print(f"nothing was observed in {found['window']}")
        return
    if points:
        _print_points(found, by)
    else:
        _print_values(found, by)


def _print_values(found: Mapping[str, Any], by: str | None) -> None:
    statistics = list(found["values"][0]["statistics"])
    printed = table((*([by] if by else []), *statistics, "observations"), right=statistics)
    for row in found["values"]:
        values = ["-" if value is None else _of(name, value, found) for name, value in row["statistics"].items()]
        printed.add_row(*([row["group"] or "-"] if by else []), *values, str(row["observations"]))
    console().print(printed)


def _print_points(found: Mapping[str, Any], by: str | None) -> None:
    printed = table((found["resolution"], *([by] if by else []), found["statistic"], "observations"))
    for row in found["points"]:
        value = "-" if row["value"] is None else _of(found["statistic"], row["value"], found)
        at = datetime.fromisoformat(row["at"]).strftime("%Y-%m-%d %H:%M")
        printed.add_row(at, *([row["group"] or "-"] if by else []), value, str(row["observations"]))
    console().print(printed)


def _of(statistic: str, value: float, found: Mapping[str, Any]) -> str:
    # Numbers of events have no unit.
    return f"{value:.4g}" if statistic in ("count", "sum", "per_minute") else _shown(value, found)


def _shown(value: float, row: Mapping[str, Any]) -> str:
    return shown(value, Unit(row["unit"]))
