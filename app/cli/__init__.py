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

from app import __version__
from app.cli import (
    config,
    database,
    dead_letters,
    demo,
    devices,
    fleet,
    models,
    namespaces,
    programs,
    runs,
    schedules,
    steering,
    up,
    workflows,
)
from app.kernel import log, settings
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
    overrides: dict[str, Any] = dict(_pair(text) for text in values or ())
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    loaded = context.obj = settings.load(config=config_file, overrides=overrides)
    # A command tells what it does in its own words; programs that serve configure their logs again.
    log.configure(loaded.settings.log.model_copy(update={"level": "warning"}))


@app.command()
def version(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print the versions of Arriero, Python and llama.cpp's binding."""
    programs.print_version(__version__, as_json=as_json)


app.command()(up.up)
app.command()(demo.demo)
app.command()(runs.run)
app.command()(runs.submit)
app.add_typer(steering.app, name="runs")
app.add_typer(workflows.app, name="workflows")
app.add_typer(schedules.app, name="schedules")
app.add_typer(models.app, name="models")
app.command()(devices.devices)
app.add_typer(fleet.app, name="fleet")
app.add_typer(fleet.pools_app, name="pools")
app.add_typer(fleet.hosts_app, name="hosts")
app.add_typer(namespaces.app, name="namespaces")
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(config.app, name="config")
app.add_typer(database.app, name="db")
app.command()(programs.api)
app.command()(programs.control)
app.command()(programs.beat)
app.command()(programs.agent)
app.command()(programs.flower)


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
