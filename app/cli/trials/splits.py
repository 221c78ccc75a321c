"""`arriero splits`: start, list, show, change and stop splits, and say how many outcomes one needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import texts
from app.cli.client import connected
from app.cli.output import AsJson, ago, console, print_json, seconds, settings_of, state, table
from app.inference.splits import definition
from app.inference.splits.definition import SplitMetric
from app.kernel import clock
from app.workflows.language import source

app = typer.Typer(no_args_is_help=True, help="Splits: a share of calls or runs goes to a candidate.")

NamedSplit = Annotated[str, typer.Argument(metavar="SPLIT", help="The name of a split.")]


@app.command("list")
def list_splits(context: typer.Context, as_json: AsJson = False) -> None:
    """List splits: those that run, then the latest."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/splits")
    if as_json:
        print_json(found)
        return
    now = clock.now()
    printed = table(("split", "state", "of", "share", "stage", "started", "by", "reason"), right=("share",))
    for row in found["splits"]:
        printed.add_row(
            row["name"],
            state(row["state"]),
            row["target"],
            f"{row['share']:.1%}",
            f"{row['stage']} of {row['stages']}",
            ago(row["created_at"], now),
            row["author"],
            row["reason"],
        )
    console().print(printed)


@app.command()
def start(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A split, in YAML or JSON; - is standard input.")],
    as_json: AsJson = False,
) -> None:
    """Start the split of a file: from now on calls or runs are divided."""
    document = source.read(texts.read(file))
    definition.parse(document.data)
    with connected(settings_of(context)) as client:
        found = client.post("/v1/splits", document.data)
    if as_json:
        print_json(found)
        return
    typer.echo(f"{found['name']} divides {found['target']}: {found['share']:.1%} for each candidate")


@app.command()
def show(context: typer.Context, name: NamedSplit, as_json: AsJson = False) -> None:
    """Show a split: the outcomes of its variants, and what they say."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/splits/{name}")
    if as_json:
        print_json(found)
    else:
        _print(found)


@app.command()
def stop(
    context: typer.Context,
    name: NamedSplit,
    reason: Annotated[str, typer.Option(help="The reason, which is shown with the split.")] = "",
    as_json: AsJson = False,
) -> None:
    """End a split: everything goes to the control. Its outcomes stay."""
    with connected(settings_of(context)) as client:
        found = client.post(f"/v1/splits/{name}/stop", parameters={"reason": reason})
    if as_json:
        print_json(found)
        return
    typer.echo(f"{name} is stopped: everything goes to the control")


@app.command()
def share(
    context: typer.Context,
    name: NamedSplit,
    part: Annotated[float, typer.Argument(metavar="SHARE", help="The part for each candidate, such as 0.25.")],
    as_json: AsJson = False,
) -> None:
    """Set the share of each candidate, in the place of its ramp."""
    with connected(settings_of(context)) as client:
        found = client.put(f"/v1/splits/{name}/share", {"share": part})
    if as_json:
        print_json(found)
        return
    typer.echo(f"{name}: {found['share']:.1%} for each candidate")


@app.command()
def remove(context: typer.Context, name: NamedSplit) -> None:
    """Remove a split that has ended, with its outcomes."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/splits/{name}")
    typer.echo(f"{name} is removed")


@app.command()
def size(
    context: typer.Context,
    effect: Annotated[float, typer.Argument(metavar="EFFECT", help="The smallest difference that matters, as 0.05.")],
    metric: Annotated[SplitMetric, typer.Option(help="What is compared.")] = SplitMetric.SCORE,
    base: Annotated[float | None, typer.Option(help="Of error and score: the mean that is expected.")] = None,
    deviation: Annotated[float | None, typer.Option(help="The standard deviation of one unit.")] = None,
    share: Annotated[float, typer.Option(help="The part of the candidate.")] = 0.5,
    power: Annotated[float, typer.Option(help="The probability to find the difference.")] = 0.8,
    alpha: Annotated[float, typer.Option(help="The probability of a wrong verdict.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Say how many users, sessions or runs it takes to find a difference."""
    asked = {"effect": effect, "metric": metric.value, "share": share, "power": power, "alpha": alpha}
    asked |= {name: value for name, value in (("base", base), ("deviation", deviation)) if value is not None}
    with connected(settings_of(context)) as client:
        found = client.post("/v1/splits/size", asked)
    if as_json:
        print_json(found)
    elif found["units"] is None:
        typer.echo("more than a billion")
    else:
        typer.echo(f"{found['units']} units, control and candidate together")


def _print(found: Mapping[str, Any]) -> None:
    stage = f"stage {found['stage']} of {found['stages']}, {found['share']:.1%} for each candidate"
    reason = f": {found['reason']}" if found["reason"] else ""
    console().print(f"{found['name']} of {found['target']}: {found['state']}{reason}; {stage}", highlight=False)
    names = ("variant", "share", "units", "runs", "errors", "p50", "p95", "first token p50", "score", "scored")
    variants = table(names, right=names[1:])
    for one in found["variants"]:
        variants.add_row(
            one["name"],
            f"{one['share']:.1%}",
            str(one["units"]),
            str(one["runs"]),
            "-" if one["error"] is None else f"{one['error']:.2%}",
            seconds(one["seconds_p50"]),
            seconds(one["seconds_p95"]),
            seconds(one["first_token_p50"]),
            "-" if one["score"] is None else f"{one['score']:.3f}",
            str(one["scored"]),
        )
    console().print(variants)
    compared = table(("candidate", "metric", "difference", "between", "and", "verdict"), right=("difference",))
    for one in found["comparisons"]:
        if one["difference"] is not None:
            compared.add_row(
                one["candidate"],
                one["metric"] + (" (goal)" if one["is_goal"] else ""),
                f"{one['difference']:+.2%}",
                _limit(one["low"]),
                _limit(one["high"]),
                one["verdict"],
            )
    console().print(compared)


def _limit(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2%}"
