"""`arriero actions`: what rules and operators have done, and what is taken back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.cli.client import connected
from app.cli.output import AsJson, ago, console, print_json, settings_of, shortened, state, table
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem

app = typer.Typer(
    no_args_is_help=True,
    help="Actions: what rules have done when they fired, with what was before, and what is taken back.\n\n"
    "An action that holds is taken back when its rule clears. `kinds` lists what rules may do.\n\n"
    "Example: arriero actions run evict_idle --set model=smollm2:135m --set idle_for=10m --dry-run",
)

_Id = Annotated[str, typer.Argument(metavar="ACTION_ID", help="The id of an action, as `actions list` shows it.")]
#: Characters of a detail in a table.
_WIDTH = 80


@app.command("list")
def list_actions(
    context: typer.Context,
    rule: Annotated[str | None, typer.Option(help="Only those of a rule.")] = None,
    with_state: Annotated[
        str | None, typer.Option("--state", help="Only those in a state: applied, done, refused, failed, undone, kept.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most actions.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List actions, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/actions", rule=rule, state=with_state, limit=limit)
    if as_json:
        print_json(found)
        return
    printed, now = table(("id", "when", "rule", "kind", "target", "state", "detail")), clock.now()
    for one in found["actions"]:
        printed.add_row(
            one["id"],
            ago(one["created_at"], now),
            shortened(one["rule"] or f"({one['cause'].get('actor') or 'by hand'})", 40),
            one["kind"],
            shortened(one["target"], 40),
            state(one["state"]),
            shortened(one["undo_detail"] or one["detail"], _WIDTH),
        )
    console().print(printed if printed.row_count else "nothing was done")


@app.command()
def show(context: typer.Context, action_id: _Id, as_json: AsJson = False) -> None:
    """Show an action: why, what was before and after, and what came of it."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/actions/{quote(action_id, safe='')}")
    _print_one(found, as_json=as_json)


@app.command()
def kinds(context: typer.Context, as_json: AsJson = False) -> None:
    """List the kinds of actions that a rule may name, with their parameters."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/actions/kinds")
    if as_json:
        print_json(found)
        return
    printed = table(("kind", "parameters", "undone", "what it does"))
    for one in found["kinds"]:
        names = [name for name in one["parameters"]["properties"] if name not in ("kind", "undo", "max_per_hour")]
        printed.add_row(
            one["kind"], ", ".join(names) or "-", "yes" if one["undone"] else "-", shortened(one["description"], 100)
        )
    console().print(printed)


@app.command()
def run(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="The kind of action, as `actions kinds` shows it.")],
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter; lists and numbers as JSON. May be repeated."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Record what would be done, and do nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Carry out an action now, within the limits that hold for rules. It holds until it is undone."""
    body = {"action": {"kind": kind, **_parsed(parameters or [])}, "reason": reason, "dry_run": dry_run}
    with connected(settings_of(context)) as client:
        found = client.post("/v1/actions", body)
    _print_one(found, as_json=as_json)


@app.command()
def undo(context: typer.Context, action_id: _Id, as_json: AsJson = False) -> None:
    """Take back an action that holds. What somebody else has changed since stays."""
    with connected(settings_of(context)) as client:
        found = client.post(f"/v1/actions/{quote(action_id, safe='')}/undo", {})
    _print_one(found, as_json=as_json)


def _parsed(given: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise InvalidInput([Problem("--set", f"{one!r} is not a parameter", "NAME=VALUE")], "request")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _print_one(found: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    printed = table(("", ""))
    printed.show_header = False
    cause = found["cause"]
    lines = {
        "id": found["id"],
        "kind": found["kind"],
        "target": found["target"],
        "state": found["state"],
        "detail": found["detail"] or "a control worker does it within moments",
        "by": f"rule {found['rule']}" if found["rule"] else cause.get("actor") or "an operator",
        "why": cause.get("summary", ""),
        "parameters": found["parameters"],
        "before": found["before"],
        "after": found["after"],
        "undone": found["undo_detail"],
    }
    for name, value in lines.items():
        if value not in (None, "", [], {}):
            printed.add_row(name, shortened(value, 1000))
    console().print(printed)
