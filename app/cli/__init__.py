"""
The `arriero` command: its options, its table of subcommands, and the table of exit codes for errors.

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

#: The first matching class determines the code. 0 is success; 1 also means that a run did not succeed.
EXIT_CODES: Mapping[type[ArrieroError], int] = {
    InvalidInput: 2,
    NotFound: 3,
    Conflict: 4,
    Unavailable: 5,
    ModelFileUnusable: 6,
    ArrieroError: 1,
}
#: The exit code that shells use for a command ended by Ctrl-C.
INTERRUPTED = 130

_HELP = """
Arriero runs durable workflows on local language models, in pools that share a machine's memory.

Start with `arriero up`, which starts everything on this machine. Then, in a second terminal:

    arriero run support-triage --input message="Where is my parcel?"

`arriero up -d` starts it in the background; `arriero status`, `logs`, `restart` and `down` see to it.

Settings come from the defaults, arriero.toml, ARRIERO_… variables and this command line; the later ones win.
`arriero config show` prints each setting with its origin.

Exit codes: 0 success; 1 the run failed or was cancelled; 2 invalid input or usage; 3 not found; 4 conflict with the
current state; 5 unavailable (server, database, broker); 6 a model's file cannot be used; 130 interrupted.
"""

#: The commands, in the order of the help.
COMMANDS: Mapping[str, LazyCommand] = {
    "up": LazyCommand(
        "app.cli.processes.up:up",
        "Run everything on this machine: servers, API, workers, beat, an agent with pools for pools.models, Flower.",
    ),
    "doctor": LazyCommand(
        "app.cli.doctor.doctor:doctor",
        "Check drivers, disk, ports, models, database, schema, broker, clocks and components, and say what to do.",
    ),
    "self-check": LazyCommand(
        "app.cli.doctor.self_check:self_check",
        "Check an installation before it runs: packages, files, disk, ports, devices, engine, servers and models.",
    ),
    "status": LazyCommand(
        "app.cli.lifecycle.status:status",
        "Show what runs on the data directory: processes, addresses, models, and the queue.",
    ),
    "logs": LazyCommand("app.cli.lifecycle.logs:logs", "Print the logs of processes, merged by time."),
    "restart": LazyCommand(
        "app.cli.lifecycle.restart:restart", "Restart one process of the running `arriero up`, or everything."
    ),
    "down": LazyCommand(
        "app.cli.lifecycle.down:down", "Stop what `arriero up` runs on the data directory, and wait until it has ended."
    ),
    "demo": LazyCommand(
        "app.cli.processes.demo:demo",
        "Run the workflow support-triage for a dozen messages of customers, on temporary servers.",
    ),
    "init": LazyCommand(
        "app.cli.starters.init:init", "Write a commented arriero.toml and a first workflow into a folder."
    ),
    "run": LazyCommand("app.cli.workflows.runs:run", "Run a workflow, watch it, and print its output."),
    "submit": LazyCommand("app.cli.workflows.runs:submit", "Submit a run and print its id, without waiting for it."),
    "chat": LazyCommand("app.cli.chat.chat:chat", "Chat with a model. /help lists the commands of a conversation."),
    "generate": LazyCommand(
        "app.cli.chat.generate:generate", "Print the answer of a model to one message, while it is written."
    ),
    "compress": LazyCommand(
        "app.cli.compress:compress",
        "Print a text or a conversation with fewer tokens, counted by a model's tokenizer.",
    ),
    "remember": LazyCommand(
        "app.cli.memory.memories:remember", "Remember a statement. One that is known already is not written twice."
    ),
    "memories": LazyCommand(
        "app.cli.memory.memories:app",
        "Memories: facts, preferences, decisions, breakthroughs and patterns that outlast a conversation.",
    ),
    "consolidate": LazyCommand(
        "app.cli.memory.consolidation:consolidate",
        "Look for patterns in what is new: messages of users, and remembered events. It works in the background.",
    ),
    "consolidations": LazyCommand(
        "app.cli.memory.consolidation:app", "Consolidations: what users say again and again becomes patterns."
    ),
    "forget": LazyCommand(
        "app.cli.memory.memories:forget", "Delete memories for real, and show that a search finds them no more."
    ),
    "recall": LazyCommand(
        "app.cli.memory.recall:recall",
        "Find what was said: messages, memories, blocks and documents, by words and by meaning.",
    ),
    "runs": LazyCommand("app.cli.workflows.run_control:app", "Runs: list, show, watch, control."),
    "workflows": LazyCommand("app.cli.workflows.workflows:app", "Workflows: list, show, store, check, compare, begin."),
    "jobs": LazyCommand("app.cli.governance.jobs:app", "Scheduled jobs: when they run, and how they ended."),
    "schedules": LazyCommand("app.cli.workflows.schedules:app", "Schedules: run workflows at given times."),
    "handoffs": LazyCommand("app.cli.handoffs.handoffs:app", "Hand-offs: messages from one protocol to another."),
    "hooks": LazyCommand("app.cli.hooks:app", "Hooks on requests to models: list them, and try shipped ones."),
    "signals": LazyCommand("app.cli.governance.signals:app", "Signals: what is measured, now and over time."),
    "rules": LazyCommand("app.cli.governance.rules:app", "Rules over signals: what they watch, when they fire."),
    "shadow": LazyCommand(
        "app.cli.trials.shadow:app",
        "Shadows: a candidate does a share of the work again, and nobody sees what it says.",
    ),
    "dataset": LazyCommand(
        "app.cli.trials.evaluate:dataset",
        "Make a dataset of runs that succeeded: their inputs and outputs, as cases for `arriero evaluate`.",
    ),
    "evaluate": LazyCommand(
        "app.cli.trials.evaluate:evaluate",
        "Have a candidate do the cases of a dataset, check the outputs, and compare them with the recorded ones.",
    ),
    "splits": LazyCommand("app.cli.trials.splits:app", "Splits: a share of calls or runs goes to a candidate."),
    "files": LazyCommand("app.cli.batches.files:app", "Files: inputs of batches, their results, and data of users."),
    "batches": LazyCommand(
        "app.cli.batches.batches:app", "Batches: the requests of a file, done while models are idle."
    ),
    "conversations": LazyCommand(
        "app.cli.memory.conversations:app", "Conversations: what was said, to read, search, continue and delete."
    ),
    "blocks": LazyCommand(
        "app.cli.memory.blocks:app", "Memory blocks: labelled texts in prompts, which models can edit."
    ),
    "context": LazyCommand("app.cli.memory.context:app", "The personal context: documents of users, for prompts."),
    "models": LazyCommand("app.cli.fleet.models:app", "Models: the catalogue, and the files of its models."),
    "devices": LazyCommand(
        "app.cli.fleet.devices:devices",
        "List the devices of this host: its RAM, its GPUs, and those that the settings declare.",
    ),
    "gpu": LazyCommand("app.cli.fleet.gpu:app", "GPUs of this host: what is missing before models run on them."),
    "fleet": LazyCommand("app.cli.fleet.fleet:app", "The fleet: hosts, their devices, and the pools on them."),
    "pools": LazyCommand(
        "app.cli.fleet.fleet:pools_app", "Pools: one process each, with one model on one set of devices."
    ),
    "hosts": LazyCommand("app.cli.fleet.fleet:hosts_app", "Hosts: machines with an agent (`arriero agent`)."),
    "namespaces": LazyCommand(
        "app.cli.fleet.namespaces:app",
        "Namespaces: the owners of runs, with their limits on the fleet and their use of it.",
    ),
    "alerts": LazyCommand(
        "app.cli.governance.alerts:app",
        "Alerts: opened when a rule fires, sent once in a cooldown, resolved when it clears.",
    ),
    "actions": LazyCommand(
        "app.cli.governance.actions:app",
        "Actions: what rules have done when they fired, with what was before, and what is taken back.",
    ),
    "limits": LazyCommand(
        "app.cli.limits:app", "Limits on calls of models and submissions of runs, of keys and namespaces."
    ),
    "costs": LazyCommand(
        "app.cli.governance.costs:app", "Costs: what work cost, and what it would have cost on another model."
    ),
    "budgets": LazyCommand(
        "app.cli.governance.budgets:app",
        "Budgets: how much a namespace, or a workflow or model in it, may cost; alerts and hard stops.",
    ),
    "scaler": LazyCommand("app.cli.governance.scaler:app", "The scaler: how many hosts are wanted, and why."),
    "mcp": LazyCommand("app.cli.mcp:mcp", "Serve one MCP client over standard input and output, until it closes them."),
    "metrics": LazyCommand(
        "app.cli.telemetry.metrics:metrics",
        "Print what models did: operations, success rate, latency, tokens and speed.",
    ),
    "audit": LazyCommand(
        "app.cli.audit:audit",
        "Print the audit log, the newest entry first: who has changed what, when, from where, and how it ended.",
    ),
    "keys": LazyCommand("app.cli.keys:app", "API keys: who may call the API, and what they may do."),
    "cache": LazyCommand(
        "app.cli.fleet.cache:app", "The response cache: answers to requests that were answered before."
    ),
    "dead-letters": LazyCommand(
        "app.cli.dead_letters:app", "Dead letters: messages and keys of the broker that no worker can read."
    ),
    "config": LazyCommand(
        "app.cli.config:app", "Settings: every value and its origin; and those that change while the processes run."
    ),
    "backup": LazyCommand(
        "app.cli.backup:app", "Save the database and the catalogue to one place, while everything runs; verify backups."
    ),
    "restore": LazyCommand(
        "app.cli.backup:restore", "Restore a backup into an empty place: a new database, a new data directory."
    ),
    "db": LazyCommand(
        "app.cli.database:app",
        "The database: the revision of its schema, its upgrade, and the roles with which agents log in.",
    ),
    "api": LazyCommand("app.cli.processes.api:api", "Serve the HTTP API, until SIGTERM."),
    "control": LazyCommand(
        "app.cli.processes.programs:control", "Run a control worker: scheduled jobs, and steps that need no model."
    ),
    "beat": LazyCommand("app.cli.processes.programs:beat", "Run beat, which triggers the scheduled jobs."),
    "agent": LazyCommand(
        "app.cli.processes.agent:app",
        "Run the agent of this host: it registers the host's devices, and starts and stops the pools on them.",
    ),
    "flower": LazyCommand(
        "app.cli.processes.programs:flower", "Run Flower, the web page that shows the Celery workers."
    ),
    "health": LazyCommand(
        "app.cli.processes.health:health",
        "Check one program of this host, for the health check of its container: exits with 0 when it works, with 1 "
        "otherwise.",
    ),
    "version": LazyCommand(
        "app.cli.version:version",
        "Print the versions of Arriero, of what it runs on, and the devices of this machine, for bug reports.",
    ),
}

app = typer.Typer(
    name="arriero",
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"arriero {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="Read this file instead of arriero.toml in this folder or the data directory."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The directory of embedded servers, models and logs.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as api.port=9000. May be repeated."),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version; `version` says more."
        ),
    ] = False,
) -> None:
    """Options before the command apply to every command."""
    if context.invoked_subcommand == "up" and not {"-h", "--help", "--in-background"} & set(sys.argv):
        # At once: the settings take longer than a user should look at an empty line.
        Console(stderr=True).print(f"arriero {__version__} is starting", highlight=False)
    from app.kernel import log, settings  # not needed for the root's help, and slow to import

    overrides: dict[str, Any] = dict(_pair(text) for text in values or ())
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    loaded = context.obj = settings.load(config=config_file, overrides=overrides)
    if loaded.settings.hooks:
        from app.inference.hooks import shipped  # only where there are hooks

        shipped.require_options(loaded.settings.hooks)
    # Commands print their own messages. Servers configure their logs again.
    log.configure(loaded.settings.log.model_copy(update={"level": "warning"}))


register(app, COMMANDS)


def main() -> None:
    """Run the command: the entry point of the console script."""
    try:
        app(standalone_mode=True)
    except ArrieroError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def exit_code_of(error: ArrieroError) -> int:
    """Return the exit code for an error."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def _pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark:
        raise InvalidSettings([Problem("--set", f"{text!r} has no '='", "KEY=VALUE, such as api.port=9000")])
    return key.strip(), value


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
