"""`arriero rules`: store, list, show, test, switch on and off, and remove rules; and their firings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import texts
from app.cli.client import connected
from app.cli.output import AsJson, ago, console, notes, print_json, settings_of, state, table
from app.governance.rules import check
from app.governance.rules.firing import FiringState
from app.kernel import clock
from app.workflows.language.source import SourceDocument

app = typer.Typer(no_args_is_help=True, help="Rules over signals: what they watch, when they fire.")

NamedRule = Annotated[str, typer.Argument(metavar="RULE", help="The name of a rule.")]


@app.command("list")
def list_rules(context: typer.Context, as_json: AsJson = False) -> None:
    """List rules, with the state of each and when it last fired."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/rules")
    if as_json:
        print_json(found)
        return
    printed = table(("rule", "state", "severity", "category", "version", "last fired", "description"))
    now = clock.now()
    for row in found["rules"]:
        shown = "dry run" if row["dry_run"] and row["enabled"] else ""
        version = f"{row['version']}, {row['source']}"
        printed.add_row(
            _named(row),
            f"{row['state']} ({shown})" if shown else state(row["state"]),
            row["severity"],
            row["category"],
            version,
            ago(row["last_fired_at"], now),
            row["description"],
        )
    console().print(printed)


@app.command()
def show(context: typer.Context, name: NamedRule, as_json: AsJson = False) -> None:
    """Show a rule: its document, its state, and its last firings."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/rules/{name}")
        firings = client.get("/v1/firings", rule=name, limit=10)
    if as_json:
        print_json(found | {"firings": firings["firings"]})
        return
    printed = table(("rule", _named(found)))
    printed.add_row("state", found["state"])
    printed.add_row("version", f"{found['version']}, {found['source']}")
    for field, value in found["rule"].items():
        if field in ("all", "any"):
            for number, condition in enumerate(value):
                printed.add_row(f"{field}[{number}]", _condition(condition))
        elif field != "rule":
            printed.add_row(field, value if isinstance(value, str) else _compact(value))
    console().print(printed)
    if firings["firings"]:
        console().print()
        _print_firings(firings["firings"])


@app.command("apply")
def apply_file(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A rule, or a list under `rules`, in YAML or JSON.")],
    enabled: Annotated[
        bool | None, typer.Option("--enabled/--disabled", help="Switch the rules on or off with it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store the rules of a file. One with the name of another is a new version of that."""
    documents = _documents(file)
    stored = []
    with connected(settings_of(context)) as client:
        for document in documents:
            name = check.name_of(document)
            stored.append(client.put(f"/v1/rules/{name}", document.data, enabled=enabled))
    if as_json:
        print_json({"rules": stored})
        return
    for one in stored:
        typer.echo(f"{_named(one)} is stored, version {one['version']}{'' if one['enabled'] else ', switched off'}")


@app.command("check")
def check_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A rule, or a list under `rules`, in YAML or JSON.")],
) -> None:
    """Check the rules of a file, without a server."""
    for document in _documents(file):
        typer.echo(f"{check.check(document).rule} is valid")


@app.command()
def delete(context: typer.Context, name: NamedRule) -> None:
    """Remove a rule; of a built-in one, what was changed. Its firings stay in the history."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/rules/{name}")
    typer.echo(f"{name} is removed")


@app.command()
def enable(context: typer.Context, name: NamedRule) -> None:
    """Switch a rule on."""
    with connected(settings_of(context)) as client:
        client.post(f"/v1/rules/{name}/enable")
    typer.echo(f"{name} is switched on")


@app.command()
def disable(context: typer.Context, name: NamedRule) -> None:
    """Switch a rule off. What it fires is cleared."""
    with connected(settings_of(context)) as client:
        client.post(f"/v1/rules/{name}/disable")
    typer.echo(f"{name} is switched off")


@app.command()
def versions(context: typer.Context, name: NamedRule, as_json: AsJson = False) -> None:
    """List the versions of a rule, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/rules/{name}/versions")
    if as_json:
        print_json(found)
        return
    printed = table(("version", "source", "author", "stored"))
    for row in found["versions"]:
        printed.add_row(str(row["version"]), row["source"], row["author"], _formatted(row["created_at"]))
    console().print(printed)


@app.command("test")
def try_rule(
    context: typer.Context,
    rule: Annotated[str, typer.Argument(metavar="RULE|FILE", help="A stored rule, or a file with rules.")],
    last: Annotated[str, typer.Option(help="How far back: 10m to 31d.")] = "24h",
    as_json: AsJson = False,
) -> None:
    """Test a rule against history: when it would have fired. Nothing is stored, and nothing is done."""
    path = Path(rule)
    with connected(settings_of(context)) as client:
        if path.suffix in {".yaml", ".yml", ".json"} or path.is_file():
            found = {
                check.name_of(document): client.post("/v1/rules/test", document.data, parameters={"last": last})
                for document in _documents(path)
            }
        else:
            found = {rule: client.post(f"/v1/rules/{rule}/test", parameters={"last": last})}
    if as_json:
        print_json(found)
        return
    for name, result in found.items():
        _print_test(name, result, last)


@app.command()
def firings(
    context: typer.Context,
    rule: Annotated[str | None, typer.Option(help="Only firings of this rule.")] = None,
    in_state: Annotated[FiringState | None, typer.Option("--state", help="Only firings in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most firings to list.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Continue where an earlier page ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """List firings of rules, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/firings", rule=rule, state=in_state, limit=limit, cursor=cursor)
    if as_json:
        print_json(found)
        return
    _print_firings(found["firings"])
    if found["next_cursor"]:
        notes().print(f"more: arriero rules firings --cursor {found['next_cursor']}", style="dim")


def _documents(file: Path) -> list[SourceDocument]:
    return check.parse(texts.read(file))


def _print_test(name: str, found: Mapping[str, Any], last: str) -> None:
    if found["measured_from"] is None:
        notes().print(f"{name}: nothing was measured in {last}, so it would not have fired")
        return
    count = len(found["firings"])
    times = "would not have fired" if not count else f"would have fired {count} time{'s' if count > 1 else ''}"
    part = f", in {found['firing_ratio'] * 100:.3g} % of the time" if count else ""
    notes().print(f"{name} {times} in the last {last}{part}")
    notes().print(
        f"evaluated each {found['step']}, on measurements since {_formatted(found['measured_from'])}", style="dim"
    )
    if not count:
        return
    printed = table(("fired", "cleared", "for", "of", "because"))
    for row in found["firings"]:
        until = row["cleared_at"] or found["end"]
        length = datetime.fromisoformat(until) - datetime.fromisoformat(row["fired_at"])
        cleared = _formatted(row["cleared_at"]) if row["cleared_at"] else "still fires"
        printed.add_row(_formatted(row["fired_at"]), cleared, str(length), row["value"] or "-", row["reason"])
    console().print(printed)


def _print_firings(found: list[Mapping[str, Any]]) -> None:
    if not found:
        notes().print("no firings")
        return
    printed = table(("fired", "rule", "state", "of", "cleared", "because"))
    for row in found:
        of = ", ".join(f"{name} {value}" for name, value in row["labels"].items())
        name = _named({"namespace": row["namespace"], "name": row["rule"]})
        shown = f"{row['state']} (dry run)" if row["dry_run"] else row["state"]
        cleared = _formatted(row["cleared_at"]) if row["cleared_at"] else "-"
        printed.add_row(
            _formatted(row["fired_at"] or row["pending_at"]), name, shown, of or "-", cleared, row["reason"]
        )
    console().print(printed)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _condition(condition: Mapping[str, Any]) -> str:
    parts = {name: value if isinstance(value, str) else _compact(value) for name, value in condition.items()}
    return " ".join(f"{name}: {value}" for name, value in parts.items())


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['namespace']}/{row['name']}" if row["namespace"] else str(row["name"])


def _formatted(instant: str) -> str:
    return datetime.fromisoformat(instant).strftime("%Y-%m-%d %H:%M:%S")
