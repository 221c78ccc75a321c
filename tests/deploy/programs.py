"""What deployment files say to start, held against the command and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from app.cli import app
from app.kernel import settings

#: What click raises for words that a command does not know; typer has a copy of click.
UsageError = typer.BadParameter.__mro__[1]

#: Values for secrets in files, by the end of their variable.
_SECRETS = {
    "DATABASE_URL_FILE": "postgresql://arriero:word@127.0.0.1/arriero",
    "REDIS_URL_FILE": "redis://:word@127.0.0.1:6379/0",
    "KEY_FILE": "a-key",
}


def require_command(arguments: Sequence[str]) -> None:
    """Parse the arguments as `arriero` would. Raises UsageError for an unknown command, option or argument."""
    context: Any = get_command(app).make_context("arriero", list(arguments))
    # A group may do something by itself, without a further word: `arriero agent`.
    while hasattr(context.command, "resolve_command") and (words := [*context._protected_args, *context.args]):
        name, command, rest = context.command.resolve_command(context, words)
        context = command.make_context(name, list(rest), parent=context)


def loaded(environment: Mapping[str, str], folder: Path) -> settings.Loaded:
    """Read the settings from such an environment. Raises InvalidSettings for an unknown variable or a wrong value."""
    given = {name: value for name, value in environment.items() if name.startswith("ARRIERO_")}
    for name in given:
        if end := next((end for end in _SECRETS if name.endswith(end)), None):
            (folder / name).write_text(_SECRETS[end])
            given[name] = str(folder / name)
    return settings.load(environment=given)
