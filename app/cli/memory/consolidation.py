"""`arriero consolidate` and `arriero consolidations`: patterns of what users say again and again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from app.cli.client import Client, connected
from app.cli.output import AsJson, ago, console, notes, print_json, settings_of, table
from app.kernel import clock
from app.kernel.security.texts import printable

app = typer.Typer(
    no_args_is_help=True,
    help="Consolidations: what users say again and again becomes patterns.\n\n"
    "Example: arriero consolidations schedule --every 1d",
)

_Id = Annotated[str, typer.Argument(metavar="ID", help="The id of a consolidation: cons_…")]
_Namespace = Annotated[str | None, typer.Option(help="By default that of the key, or `default`.")]
_Model = Annotated[str | None, typer.Option("--model", "-m", help="The model that states patterns, or a selector.")]
_Review = Annotated[str | None, typer.Option(help="The model of the second pass; by default the same one.")]
_FINAL = ("succeeded", "failed", "cancelled")
#: Seconds between two looks.
_POLL = 1.0


def consolidate(
    context: typer.Context,
    model: _Model = None,
    review_model: _Review = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show the progress until it has ended.")] = False,
    namespace: _Namespace = None,
    as_json: AsJson = False,
) -> None:
    """
    Look for patterns in what is new: messages of users, and remembered events. It works in the background.

    Example: arriero consolidate --model qwen3:4b --wait
    """
    body = {name: one for name, one in (("model", model), ("review_model", review_model)) if one is not None}
    with connected(settings_of(context)) as client:
        found = client.post(_path(namespace=namespace), body)
        if not found["created"]:
            notes().print("[dim]one is in progress already[/]")
        if wait:
            found = _watch(client, found)
        patterns = _patterns(client, found)
    if as_json:
        print_json(found)
    elif wait:
        _print_one(found, patterns)
    else:
        typer.echo(found["id"])
    if found["state"] in ("failed", "cancelled"):
        raise typer.Exit(1)


@app.command("list")
def list_consolidations(
    context: typer.Context,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=200, help="Most consolidations.")] = 20,
    namespace: Annotated[str | None, typer.Option(help="By default that of the key, or all.")] = None,
    as_json: AsJson = False,
) -> None:
    """List consolidations, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/consolidations", limit=limit, namespace=namespace)
    if as_json:
        print_json(found)
        return
    if not found["consolidations"]:
        typer.echo("there is no consolidation; `arriero consolidate` begins one")
        return
    now = clock.now()
    numbers = ("turns", "clusters", "written", "merged", "refused", "tokens")
    printed = table(("id", "namespace", "state", *numbers, "begun"), right=numbers)
    for one in found["consolidations"]:
        printed.add_row(
            one["id"],
            one["namespace"],
            _state(one),
            *(str(one[name]) for name in numbers[:-1]),
            str(one["tokens_in"] + one["tokens_out"]),
            ago(one["created_at"], now),
        )
    console().print(printed)


@app.command()
def show(context: typer.Context, consolidation_id: _Id, as_json: AsJson = False) -> None:
    """Show a consolidation: its progress, its cost, and what became of each cluster."""
    with connected(settings_of(context)) as client:
        found = client.get(_path(consolidation_id))
        patterns = {} if as_json else _patterns(client, found)
    print_json(found) if as_json else _print_one(found, patterns)


@app.command()
def cancel(context: typer.Context, consolidation_id: _Id) -> None:
    """Cancel a consolidation. Its turns are read by the next one."""
    with connected(settings_of(context)) as client:
        client.post(f"{_path(consolidation_id)}/cancel", {})
    typer.echo(f"{consolidation_id} cancelled")


@app.command()
def schedule(
    context: typer.Context,
    every: Annotated[str | None, typer.Option(help="An interval from 1m to 366d, or `never`.")] = None,
    model: _Model = None,
    review_model: _Review = None,
    namespace: _Namespace = None,
    as_json: AsJson = False,
) -> None:
    """
    Show or choose how often a namespace is consolidated. Without options it is shown.

    Example: arriero consolidations schedule --every 1d --model qwen3:4b
    """
    path = _path("schedule", namespace=namespace)
    with connected(settings_of(context)) as client:
        found = client.get(path)
        given = {"every": every, "model": model, "review_model": review_model}
        if any(one is not None for one in given.values()):
            body = {name: found[name] if one is None else one for name, one in given.items()}
            body["every"] = None if every == "never" else body["every"]
            found = client.put(path, body)
    if as_json:
        print_json(found)
        return
    often = "only by hand" if found["every"] is None else f"every {found['every']}, next at {found['next_at'][:19]}Z"
    console().print(Text(f"{found['namespace']}: {often}"))
    models = f"by {found['effective_model']}, reviewed by {found['effective_review_model']}"
    console().print(Text(models), style="dim")


def _watch(client: Client, found: Mapping[str, Any]) -> Any:
    """Return a consolidation when it has ended; its progress is noted when it changes."""
    last = ""
    while True:
        progress = found["progress"]
        now = f"{found['state']}"
        if found["waits_for"]:
            now += f", waits for {found['waits_for']}"
        elif progress["requests"]:
            now += f", {progress['done']} of {progress['requests']} requests, {found['tokens_in']} tokens read"
        if now != last:
            notes().print(Text(now), style="dim")
            last = now
        if found["state"] in _FINAL:
            return found
        time.sleep(_POLL)
        found = client.get(_path(found["id"]))


def _patterns(client: Client, found: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the patterns of a consolidation, by the id of their memory; those that are there."""
    wanted = {one["memory"] for one in found["outcomes"] if "memory" in one}
    if not wanted:
        return {}
    page = client.get("/v1/memories", kind="pattern", namespace=found["namespace"], limit=1000)["memories"]
    return {one["id"]: one["text"] for one in page if one["id"] in wanted}


def _print_one(found: Mapping[str, Any], patterns: Mapping[str, str]) -> None:
    progress = found["progress"]
    lines = [
        f"{found['id']}  {_state(found)}" + (f": {found['error']}" if found["error"] else ""),
        f"{found['turns']} turns ({found['leftovers']} left over before), {found['clusters']} clusters",
        f"{progress['done']} of {progress['requests']} requests done",
        f"{found['written']} written, {found['merged']} merged, {found['refused']} refused",
        f"{found['tokens_in']} tokens read, {found['tokens_out']} written"
        + ("" if found["cost"] is None else f", cost {found['cost']:.4f}"),
    ]
    if found["waits_for"]:
        lines.append(f"waits for {found['waits_for']}")
    if found["has_more"]:
        lines.append("more turns are left for the next one")
    for line in lines:
        console().print(Text(printable(line)))
    if found["outcomes"]:
        console().print(_outcomes(found["outcomes"], patterns))


def _outcomes(outcomes: Sequence[Mapping[str, Any]], patterns: Mapping[str, str]) -> Any:
    printed = table(("cluster", "turns", "outcome", "confidence", "pattern"), right=("cluster", "turns", "confidence"))
    for one in outcomes:
        what = patterns.get(one.get("memory", ""), one.get("memory", one.get("reason", "")))
        confidence = f"{one['confidence']:.2f}"
        printed.add_row(str(one["cluster"]), str(one["turns"]), one["outcome"], confidence, Text(printable(what)))
    return printed


def _state(one: Mapping[str, Any]) -> str:
    return str(one["state"])


def _path(name: str = "", *, namespace: str | None = None) -> str:
    path = f"/v1/consolidations/{quote(name, safe='')}" if name else "/v1/consolidations"
    return path if namespace is None else f"{path}?namespace={quote(namespace, safe='')}"
