"""`arriero cache`: what the response cache keeps and did, and its purge."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, settings_of, table
from app.kernel.units.sizes import rounded

app = typer.Typer(
    no_args_is_help=True,
    help="The response cache: answers to requests that were answered before.\n\n"
    "Example: arriero cache purge --model smollm2:135m",
)


@app.command()
def stats(context: typer.Context, as_json: AsJson = False) -> None:
    """Show what is kept, and how many calls it served, by namespace and model."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/cache")
    if as_json:
        print_json(found)
        return
    if not found["enabled"]:
        console().print("the response cache is off (setting cache.enabled)")
    elif not found["models"]:
        console().print("no answers yet")
        return
    numbers = ("answers", "size", "hits", "shared", "misses", "served by the cache")
    view = table(("namespace", "model", *numbers), right=numbers)
    for one in found["models"]:
        served, calls = one["hits"] + one["shared"], one["hits"] + one["shared"] + one["misses"]
        counts = (str(one[name]) for name in ("hits", "shared", "misses"))
        size, share = rounded(one["bytes"]), f"{served / calls:.0%}" if calls else ""
        view.add_row(one["namespace"], one["model"], str(one["entries"]), size, *counts, share)
    console().print(view)


@app.command()
def purge(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Only answers of this model.")] = "",
    namespace: Annotated[str, typer.Option(help="Only answers of this namespace.")] = "",
    as_json: AsJson = False,
) -> None:
    """Remove kept answers: all, or those of a model or a namespace."""
    given = {"model": model, "namespace": namespace}
    with connected(settings_of(context)) as client:
        found = client.delete("/v1/cache", **{name: value for name, value in given.items() if value})
    if as_json:
        print_json(found)
        return
    console().print(f"{found['removed']} {'answer' if found['removed'] == 1 else 'answers'} removed")
