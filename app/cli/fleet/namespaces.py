"""`arriero namespaces`: the limits of namespaces on the fleet, and their use of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, seconds, settings_of, table
from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations
from app.kernel.units.sizes import rounded

app = typer.Typer(
    no_args_is_help=True,
    help="Namespaces: the owners of runs, with their limits on the fleet and their use of it.\n\n"
    "The label `namespace` of a run is its namespace; a run without it belongs to `default`.\n\n"
    "Example: arriero namespaces limit research --bytes 24GiB --device-time 6h",
)

_Name = Annotated[str, typer.Argument(metavar="NAMESPACE", help="The name of a namespace, such as research.")]


@app.command("list")
def list_namespaces(context: typer.Context, as_json: AsJson = False) -> None:
    """List the namespaces that have limits or used devices recently."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/namespaces")
    if as_json:
        print_json(found)
        return
    _print(found["namespaces"])


@app.command()
def limit(
    context: typer.Context,
    name: _Name,
    size: Annotated[
        str | None, typer.Option("--bytes", help="Most memory that its pools may hold at a time: '24GiB'.")
    ] = None,
    time: Annotated[
        str | None, typer.Option("--device-time", help="Most device time that it may use in a period: '6h'.")
    ] = None,
    period: Annotated[str, typer.Option(help="The period: '1d'.")] = "1d",
    weight: Annotated[float, typer.Option(help="Its weight in the fair share among namespaces with demand.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """
    Set the limits of a namespace. They replace its earlier limits.

    Running pools keep their memory; no pool is started beyond the limits. `free` removes the limits.
    """
    if size is None and time is None and weight == 1.0:
        raise InvalidInput(
            [
                Problem(
                    "limits",
                    "no limit is set",
                    "--bytes, --device-time or --weight; to remove limits: `arriero namespaces free NAME`",
                )
            ],
            "request",
        )
    body = {"max_bytes": size, "max_device_time": time, "period": period, "weight": weight}
    _put(context, name, body, as_json=as_json)


@app.command()
def free(context: typer.Context, name: _Name, as_json: AsJson = False) -> None:
    """Remove the limits of a namespace."""
    _put(context, name, {}, as_json=as_json)


def _put(context: typer.Context, name: str, body: Mapping[str, Any], *, as_json: bool) -> None:
    with connected(settings_of(context)) as client:
        found = client.put(f"/v1/namespaces/{quote(name, safe='')}", body)
    if as_json:
        print_json(found)
        return
    _print([found])


def _print(namespaces: Sequence[Mapping[str, Any]]) -> None:
    columns = ("namespace", "weight", "held", "limit", "used in period", "limit", "period", "attained", "state")
    printed = table(columns, right=columns[1:8])
    for one in namespaces:
        used_up = one["exhausted_until"] is not None
        printed.add_row(
            one["name"],
            f"{one['weight']:g}",
            rounded(one["held_bytes"]),
            "-" if one["max_bytes"] is None else rounded(one["max_bytes"]),
            seconds(one["used_device_s"]),
            "-" if one["max_device_s"] is None else durations.show(timedelta(seconds=one["max_device_s"])),
            durations.show(timedelta(seconds=one["period_s"])),
            seconds(one["attained_s"]),
            Text(f"exhausted until {one['exhausted_until']:.16}", "bold red") if used_up else "-",
        )
    console().print(printed if printed.row_count else "no namespace has limits, and none used devices recently")
