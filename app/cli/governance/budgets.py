"""`arriero budgets`: how much a namespace may cost in a day, a week or a month."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, settings_of, table
from app.governance.costs.budget import BudgetPeriod

app = typer.Typer(
    no_args_is_help=True,
    help="Budgets: how much a namespace, or a workflow or model in it, may cost; alerts and hard stops.\n\n"
    "Example: arriero budgets set monthly 250 --namespace research --hard",
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of the budget in its namespace.")]
_Namespace = Annotated[str | None, typer.Option(help="Its namespace, by default `default`.")]


@app.command("list")
def list_budgets(
    context: typer.Context,
    namespace: Annotated[str | None, typer.Option(help="Only this namespace.")] = None,
    as_json: AsJson = False,
) -> None:
    """List budgets, and what was spent of each."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/budgets", namespace=namespace)
    print_json(found) if as_json else _print(found["budgets"])


@app.command()
def show(context: typer.Context, name: _Name, namespace: _Namespace = None, as_json: AsJson = False) -> None:
    """Show a budget."""
    with connected(settings_of(context)) as client:
        found = client.get(_path(name), namespace=namespace)
    print_json(found) if as_json else _print([found])


@app.command("set")
def set_(
    context: typer.Context,
    name: _Name,
    amount: Annotated[float, typer.Argument(help="In the currency of the settings (costs.currency).")],
    period: Annotated[BudgetPeriod, typer.Option(help="'day', 'week' or 'month'.")] = BudgetPeriod.MONTH,
    workflow: Annotated[str | None, typer.Option(help="Only what this workflow costs.")] = None,
    model: Annotated[str | None, typer.Option(help="Only what this model costs.")] = None,
    hard: Annotated[bool, typer.Option("--hard", help="Refuse new work when it is used up.")] = False,
    spares_interactive: Annotated[
        bool, typer.Option("--spare-interactive", help="Never refuse interactive work.")
    ] = False,
    namespace: _Namespace = None,
    as_json: AsJson = False,
) -> None:
    """Set a budget, in the place of an earlier one of the name. Without --hard it only alerts."""
    body = {"amount": amount, "period": period.value, "workflow": workflow, "model": model}
    body |= {"hard": hard, "spares_interactive": spares_interactive}
    with connected(settings_of(context)) as client:
        found = client.put(_path(name), body, namespace=namespace)
    print_json(found) if as_json else _print([found])


@app.command()
def remove(context: typer.Context, name: _Name, namespace: _Namespace = None) -> None:
    """Remove a budget."""
    with connected(settings_of(context)) as client:
        client.delete(_path(name), **({} if namespace is None else {"namespace": namespace}))
    typer.echo(f"the budget {name} is removed")


def _path(name: str) -> str:
    return f"/v1/budgets/{quote(name, safe='')}"


def _print(budgets: Sequence[Mapping[str, Any]]) -> None:
    columns = ("namespace", "budget", "of", "spent", "amount", "used", "per", "stops", "begins anew")
    printed = table(columns, right=("spent", "amount", "used"))
    for one in budgets:
        of = ", ".join(f"{kind} {one[kind]}" for kind in ("workflow", "model") if one[kind]) or "all"
        stops = "no" if not one["hard"] else "all but interactive" if one["spares_interactive"] else "new work"
        amounts = (_amount(one["spent"]), f"{_amount(one['amount'])} {one['currency']}", f"{one['used']:.0%}")
        printed.add_row(one["namespace"], one["name"], of, *amounts, one["period"], stops, one["resets_at"][:16])
    console().print(printed if printed.row_count else "there is no budget")


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.6f}"
