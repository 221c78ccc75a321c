"""`arriero shadow`: start, list, report and stop shadows; and two models side by side at the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import texts
from app.cli.client import connected
from app.cli.output import AsJson, ago, console, notes, print_json, settings_of, state, table
from app.inference.shadows import definition
from app.kernel import clock, ids
from app.kernel.errors import InvalidInput, Problem
from app.workflows.language import source

app = typer.Typer(help="Shadows: a candidate does a share of the work again, and nobody sees what it says.")

NamedShadow = Annotated[str, typer.Argument(metavar="SHADOW", help="The name of a shadow.")]
#: A page that needs nothing else.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border-bottom: 1px solid #999; padding: .3rem .8rem; text-align: left; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


@app.callback(invoke_without_command=True)
def shadow(
    context: typer.Context,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Two models answer side by side, and you vote.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="With --interactive: the model.")] = None,
    candidate: Annotated[str | None, typer.Option(help="With --interactive: the candidate.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="With --interactive: most tokens of an answer.")] = 400,
) -> None:
    """Shadows: a candidate does a share of the work again, and nobody sees what it says."""
    if context.invoked_subcommand is not None:
        return
    if not interactive:
        typer.echo(context.get_help())
        return
    if model is None or candidate is None:
        missing = "--model" if model is None else "--candidate"
        raise InvalidInput([Problem(missing, "it is needed with --interactive", "the name of a model")], "command")
    from app.cli.trials import side_by_side

    def ask(what: str) -> str:
        return input(f"{what}> ")

    with connected(settings_of(context)) as client:
        options = {"max_tokens": max_tokens}
        counted = side_by_side.vote_on(client, (model, candidate), ask, options, lambda: bool(ids.new_id().int & 1))
    notes().print(", ".join(f"{name}: {count}" for name, count in counted.most_common()) or "no votes", highlight=False)


@app.command()
def start(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A shadow, in YAML or JSON; - is standard input.")],
    as_json: AsJson = False,
) -> None:
    """Start the shadow of a file."""
    document = source.read(texts.read(file))
    definition.parse(document.data)
    with connected(settings_of(context)) as client:
        found = client.post("/v1/shadows", document.data)
    if as_json:
        print_json(found)
        return
    typer.echo(f"{found['name']} does {found['share']:.1%} of {found['target']} again")


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """List shadows: those that run, then the latest."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/shadows")
    if as_json:
        print_json(found)
        return
    now = clock.now()
    printed = table(("shadow", "state", "of", "share", "started", "by", "reason"), right=("share",))
    for row in found["shadows"]:
        started = ago(row["created_at"], now)
        shown = (row["name"], state(row["state"]), row["target"], f"{row['share']:.1%}", started)
        printed.add_row(*shown, row["author"], row["reason"])
    console().print(printed)


@app.command()
def report(
    context: typer.Context,
    name: NamedShadow,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a shadow has found."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/shadows/{name}")
    if html is not None:
        html.write_text(_page(found), encoding="utf-8")
        notes().print(f"the report is in {html}", highlight=False)
        return
    if as_json:
        print_json(found)
        return
    console().print(_heading(found), highlight=False)
    rows = _rows(found)
    if rows:
        printed = table(_COLUMNS, right=_COLUMNS[1:5])
        for row in rows:
            printed.add_row(*row)
        console().print(printed)
    for line in _more(found):
        console().print(line, highlight=False)


@app.command()
def stop(
    context: typer.Context,
    name: NamedShadow,
    reason: Annotated[str, typer.Option(help="The reason, which is shown with the shadow.")] = "",
    as_json: AsJson = False,
) -> None:
    """End a shadow. Runs of its candidate that have begun are still compared."""
    with connected(settings_of(context)) as client:
        found = client.post(f"/v1/shadows/{name}/stop", parameters={"reason": reason})
    if as_json:
        print_json(found)
        return
    typer.echo(f"{name} is stopped")


@app.command()
def remove(context: typer.Context, name: NamedShadow) -> None:
    """Remove a shadow that has ended, with its pairs."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/shadows/{name}")
    typer.echo(f"{name} is removed")


_COLUMNS = ("metric", "pairs", "difference", "between", "and", "verdict")


def _heading(found: Mapping[str, Any]) -> str:
    reason = f" ({found['reason']})" if found["reason"] else ""
    state_ = f"{found['name']} of {found['target']}: {found['state']}{reason}"
    return f"{state_}; {found['compared']} pairs, {found['open']} open"


def _rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            one["metric"],
            str(one["pairs"]),
            f"{one['difference']:+.2%}",
            _limit(one["low"]),
            _limit(one["high"]),
            one["verdict"],
        )
        for one in found["metrics"]
    ]


def _more(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if found["similarity"] is not None:
        lines.append(f"similarity of the texts: {found['similarity']:.3f} ({found['similar_pairs']} pairs)")
    if found["preferences"]:
        listed = ", ".join(f"{name} {count}" for name, count in found["preferences"].items())
        bias = "" if found["position_bias"] is None else f"; it named the first place in {found['position_bias']:.0%}"
        lines.append(f"the judge prefers: {listed}{bias}")
    if found["skipped"]:
        lines.append("left out: " + ", ".join(f"{count} ({reason})" for reason, count in found["skipped"].items()))
    return lines


def _page(found: Mapping[str, Any]) -> str:
    """The report as a page that needs nothing else."""
    cells = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if 0 < at < 5 else ''}>{escape(cell)}</td>" for at, cell in enumerate(row))
        + "</tr>"
        for row in _rows(found)
    )
    heads = "".join(f"<th scope=col>{escape(name)}</th>" for name in _COLUMNS)
    metrics = f"<table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table>" if cells else ""
    more = "".join(f"<p>{escape(line)}</p>" for line in _more(found))
    body = f"<p>{escape(_heading(found))}</p>{metrics}{more}"
    return _PAGE.format(title=escape(f"Shadow {found['name']}"), body=body)


def _limit(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2%}"
