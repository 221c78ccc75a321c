"""`arriero costs`: what work cost, and what it would have cost on another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from app.cli.client import connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, table

app = typer.Typer(
    no_args_is_help=False,
    invoke_without_command=True,
    help="Costs: what work cost, and what it would have cost on another model.\n\n"
    "Example: arriero costs --by workflow --since 30d",
)

_Since = Annotated[str, typer.Option("--since", "--last", help="The length of the window: '24h', '7d', '30d'.")]
_Workflow = Annotated[str | None, typer.Option(help="Only this workflow.")]
_Model = Annotated[str | None, typer.Option(help="Only what this model did.")]
_Namespace = Annotated[str | None, typer.Option(help="Only this namespace.")]


@app.callback()
def costs(
    context: typer.Context,
    by: Annotated[str, typer.Option(help="'model', 'namespace', 'workflow', 'day' or 'label:NAME'.")] = "model",
    since: _Since = "7d",
    workflow: _Workflow = None,
    model: _Model = None,
    namespace: _Namespace = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most lines.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Print what work cost in a window, with failed and cancelled attempts; `estimate` compares with another model."""
    if context.invoked_subcommand is not None:
        return
    with connected(settings_of(context)) as client:
        asked = {"by": by, "last": since, "workflow": workflow, "model": model, "namespace": namespace}
        found = client.get("/v1/costs", **asked, limit=limit)
    if as_json:
        print_json(found)
        return
    columns = (by, found["currency"], "attempts", "unknown", "read", "cached", "written", "device s")
    printed = table(columns, right=columns[1:])
    for line in found["lines"]:
        _add(printed, line["key"] or "-", line)
    if not printed.row_count:
        console().print(f"no model did anything in the last {since}")
        return
    printed.add_section()
    _add(printed, "total", found["total"])
    console().print(printed)
    if found["more"]:
        notes().print("there are further lines; the total has them", style="dim")
    if found["total"]["unpriced"]:
        notes().print(
            f"{found['total']['unpriced']} attempts have no known cost: models without prices, devices without rates "
            "(costs.devices), or work that was lost",
            style="dim",
        )


@app.command()
def estimate(
    context: typer.Context,
    on: Annotated[str, typer.Option(help="The other model.")],
    since: _Since = "7d",
    workflow: _Workflow = None,
    model: _Model = None,
    namespace: _Namespace = None,
    as_json: AsJson = False,
) -> None:
    """Print what the recorded work would have cost on another model, and what that assumes."""
    with connected(settings_of(context)) as client:
        asked = {"on": on, "last": since, "workflow": workflow, "model": model, "namespace": namespace}
        found = client.get("/v1/costs/estimate", **asked)
    if as_json:
        print_json(found)
        return
    done, currency = found["recorded"], found["currency"]
    typer.echo(
        f"recorded: {done['attempts']} attempts, {done['tokens_in']:,} tokens read, {done['tokens_out']:,} written"
    )
    unknown = f" ({done['unpriced']} attempts of unknown cost)" if done["unpriced"] else ""
    typer.echo(f"it cost: {_amount(done['cost'])} {currency}{unknown}")
    amount = "unknown" if found["amount"] is None else f"{_amount(found['amount'])} {currency}"
    cached = "" if found["with_cache"] is None else f", or {_amount(found['with_cache'])} {currency} with cached tokens"
    typer.echo(f"on {found['on']}: {amount}{cached}")
    for line in found["assumed"]:
        typer.echo(f"- {line}")


def _add(printed: Any, name: str, line: Mapping[str, Any]) -> None:
    printed.add_row(
        name,
        _amount(line["cost"]),
        *(f"{line[key]:,}" for key in ("attempts", "unpriced", "tokens_in", "tokens_cached", "tokens_out")),
        f"{line['device_s']:,.1f}",
    )


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value >= 100 else f"{value:.6f}"
