"""
The `arriero` command. `EXIT_CODES` is the one table from errors to exit codes.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from app.cli.lazy import LazyCommand, register
from app.kernel.errors import (
    ArrieroError,
    Conflict,
    InvalidInput,
    InvalidSettings,
    ModelFileUnusable,
    NotFound,
    Problem,
    Unavailable,
)

#: The first class that an error belongs to counts. 0 is success; 1 is a run that did not succeed.
EXIT_CODES: Mapping[type[ArrieroError], int] = {
    InvalidInput: 2,
    NotFound: 3,
    Conflict: 4,
    Unavailable: 5,
    ModelFileUnusable: 6,
    ArrieroError: 1,
}
#: What a shell gives a command that Ctrl-C ended.
INTERRUPTED = 130

_HELP = """
Arriero runs workflows on local language models: durable, on pools that share a machine's memory.

Begin with `arriero up`, which starts everything on this machine, and in a second terminal:

    arriero run support-triage --input message="Where is my parcel?"

Settings come from defaults, then arriero.toml, then ARRIERO_… variables, then this command line;
`arriero config show` prints each with its origin.

Exit codes: 0 done; 1 the run failed or was cancelled; 2 wrong input or usage; 3 not found; 4 the state does not
allow it; 5 a part is away (server, database, broker); 6 a model's file cannot be used; 130 interrupted.
"""

#: Every command, in the order of the help.
COMMANDS: Mapping[str, LazyCommand] = {
    "up": LazyCommand(
        "app.cli.up:up",
        "Run everything on this machine: servers, API, workers, beat, an agent with pools for pools.models, Flower.",
    ),
    "demo": LazyCommand(
        "app.cli.demo:demo",
        "Run the workflow support-triage for a dozen customers' messages, on servers that are started for it.",
    ),
    "run": LazyCommand("app.cli.runs:run", "Run a workflow, watch it, and print its output."),
    "submit": LazyCommand("app.cli.runs:submit", "Submit a run and print its id; it goes on by itself."),
    "runs": LazyCommand("app.cli.steering:app", "Runs: list, show, watch, steer."),
    "workflows": LazyCommand("app.cli.workflows:app", "Workflows: list, show, store, check, compare."),
    "schedules": LazyCommand("app.cli.schedules:app", "Schedules: run workflows at given times."),
    "models": LazyCommand("app.cli.models:app", "Models: what can be served, and where their files are."),
    "devices": LazyCommand(
        "app.cli.devices:devices",
        "List the devices of this host: its RAM, its NVIDIA GPUs, and those that fleet.simulated declares.",
    ),
    "fleet": LazyCommand("app.cli.fleet:app", "The fleet: hosts, their devices, and the pools that lie on them."),
    "pools": LazyCommand("app.cli.fleet:pools_app", "Pools: one process each, with one model on one set of devices."),
    "hosts": LazyCommand("app.cli.fleet:hosts_app", "Hosts: machines with an agent (`arriero agent`)."),
    "namespaces": LazyCommand(
        "app.cli.namespaces:app", "Namespaces: on whose behalf runs are done, what each may hold and use, and does."
    ),
    "dead-letters": LazyCommand(
        "app.cli.dead_letters:app", "Dead letters: messages and keys of the broker that no worker can read."
    ),
    "config": LazyCommand("app.cli.config:app", "Settings: every value, and where it came from."),
    "db": LazyCommand("app.cli.database:app", "The database: its schema, and the one that this version needs."),
    "api": LazyCommand("app.cli.api:api", "Serve the HTTP API, until SIGTERM."),
    "control": LazyCommand(
        "app.cli.programs:control", "Run a control worker: scheduled jobs, and steps that need no model."
    ),
    "beat": LazyCommand("app.cli.programs:beat", "Run the clock of the scheduled jobs."),
    "agent": LazyCommand(
        "app.cli.programs:agent",
        "Run the agent of this host: it offers the host's devices, and starts and stops the pools that are placed "
        "there.",
    ),
    "flower": LazyCommand("app.cli.programs:flower", "Run Flower, the page that watches the Celery workers."),
    "version": LazyCommand("app.cli.version:version", "Print the versions of Arriero, Python and llama.cpp's binding."),
}

app = typer.Typer(
    name="arriero",
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    context: typer.Context,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Read this file instead of ./arriero.toml.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Where embedded servers, models and logs live.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as api.port=9000. May be repeated."),
    ] = None,
) -> None:
    """Options before the command hold for every command."""
    from app.kernel import log, settings  # the help of the root needs neither, and they take longest to load

    overrides: dict[str, Any] = dict(_pair(text) for text in values or ())
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    loaded = context.obj = settings.load(config=config_file, overrides=overrides)
    # A command tells what it does in its own words; programs that serve configure their logs again.
    log.configure(loaded.settings.log.model_copy(update={"level": "warning"}))


register(app, COMMANDS)


def main() -> None:
    """The console script."""
    try:
        app(standalone_mode=True)
    except ArrieroError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def exit_code_of(error: ArrieroError) -> int:
    """The exit code that tells of an error."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def _pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark:
        raise InvalidSettings([Problem("--set", f"{text!r} has no '='", "KEY=VALUE, such as api.port=9000")])
    return key.strip(), value


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
