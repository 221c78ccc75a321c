"""`arriero scaler`: how many hosts are wanted, and why."""

from __future__ import annotations

from typing import Any

import typer

from app.cli.client import connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, table

app = typer.Typer(no_args_is_help=True, help="The scaler: how many hosts are wanted, and why.")


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the classes of hosts: those that are there, what was asked for, and what was not accepted yet."""
    found = _found(context)
    if as_json:
        print_json(found)
        return
    printed = table(("class", "type", "hosts", "draining", "asked for", "limits", "last request"), right=("hosts",))
    for one in found["classes"]:
        draining = sum(host["state"] == "draining" for host in one["hosts"])
        pending = one["pending"]
        asked = f"{pending['hosts']} (not accepted, {pending['attempts']} failed)" if pending else f"{one['wanted']}"
        limits, at = f"{one['min']} to {one['max']}", one["asked_at"] or "-"
        printed.add_row(one["name"], one["type"], f"{len(one['hosts'])}", f"{draining}", asked, limits, at)
    console().print(printed)
    for one in found["classes"]:
        if one["pending"] and one["pending"]["error"]:
            notes().print(f"{one['name']}: {one['pending']['error']}", style="yellow")


@app.command()
def plan(context: typer.Context, as_json: AsJson = False) -> None:
    """Show what the next pass would do, with the reasons. Changes nothing, in any mode."""
    found = _found(context)
    if as_json:
        print_json(found)
        return
    for one in found["classes"]:
        verb = "would ask for" if one["would_ask"] else "stays at"
        console().print(f"{one['name']}: {len(one['hosts'])} hosts, {one['needed']} needed; {verb} {one['wanted']}")
        for what in ("drain", "keep", "release"):
            if one[what]:
                console().print(f"  {what}: {', '.join(one[what])}")
        for reason in one["reasons"]:
            console().print(f"  {reason}")


def _found(context: typer.Context) -> dict[str, Any]:
    with connected(settings_of(context)) as client:
        found: dict[str, Any] = client.get("/v1/scaler")
    if found["mode"] != "on":
        notes().print(f"scaler.mode is {found['mode']}: nothing is asked for", style="yellow")
    if not found["classes"]:
        notes().print("there are no classes: add tables [[scaler.classes]] to the settings", style="yellow")
    return found
