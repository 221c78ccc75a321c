"""`arriero up`: runs everything on this machine until Ctrl-C."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer
from rich.markup import escape
from rich.panel import Panel

from app.cli.client import url_of
from app.cli.output import notes, settings_of
from app.cli.processes.tree import Interrupted, Signals, Tree, running_tree

_COLOURS = {"info": "green", "warning": "yellow", "error": "bold red"}


def up(
    context: typer.Context,
    flower: Annotated[bool, typer.Option(help="Start Flower too.")] = True,
) -> None:
    """
    Run everything on this machine: servers, API, workers, beat, an agent with pools for pools.models, Flower.

    Without ARRIERO_DATABASE_URL and ARRIERO_REDIS_URL, Postgres and Valkey are embedded; their data, the logs and
    downloaded models are in the data directory. Programs that end by themselves are restarted. Ctrl-C stops everything;
    running steps may finish within pools.drain_timeout, a second Ctrl-C ends them immediately.
    """
    signals = Signals()
    settings = settings_of(context)
    with suppress(Interrupted):
        signals.install()
        with running_tree(settings, signals, report, flower=flower) as tree:
            tree.wait_until_ready(settings.pools.start_timeout)
            _announce(tree, flower=flower)
            tree.watch()
    if signals.received:
        report("info", "everything is stopped")


def report(level: str, text: str) -> None:
    """Print a line on standard error, in the colour of its level; further lines of the text are dimmed."""
    first, _, rest = text.partition("\n")
    notes().print(f"[{_COLOURS[level]}]•[/] {escape(first)}", soft_wrap=True)
    if rest:
        notes().print(escape(rest), style="dim", soft_wrap=True)


def _announce(tree: Tree, *, flower: bool) -> None:
    settings, url = tree.settings, url_of(tree.settings)
    lines = [f"[bold]API[/]      {url}", f"[bold]OpenAPI[/]  {url}/docs"]
    if flower:
        lines.append(f"[bold]Flower[/]   http://{settings.flower.host}:{settings.flower.port}")
    lines += [
        f"[bold]Models[/]   {escape(', '.join(settings.pools.models) or 'none')}",
        f"[bold]Data[/]     {escape(str(tree.directory))}",
        "",
        "Try in another terminal:",
        "  arriero models pull gemma3:270m",
        '  arriero run support-triage --input message="Where is my parcel?"',
        "  arriero fleet",
        "Ctrl-C stops everything.",
    ]
    notes().print(Panel("\n".join(lines), title="arriero is up", title_align="left", expand=False))
