"""
Lazy commands: a command's module is imported when the command runs, not for the root's help or completion.

Each command has an entry in a table with its first line of help. A test compares that line with the command's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_command, get_group


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """A command or a group of commands, and the place of its code."""

    #: `module:attribute`; the attribute is a function, or a `typer.Typer` for a group.
    where: str
    #: The first paragraph of its help.
    help: str

    def load(self, name: str) -> Any:
        """Import the module and return the command."""
        module, _, attribute = self.where.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            single = typer.Typer(rich_markup_mode="markdown", add_completion=False)
            single.command(name)(found)
            return get_command(single)
        found.rich_markup_mode = "markdown"
        found._add_completion = False  # the root command has these options
        group = get_group(found)
        group.name = name
        return group


def register(app: typer.Typer, commands: Mapping[str, LazyCommand]) -> None:
    """Register the commands under their names, in order."""
    for name, command in commands.items():
        app.command(name, cls=_deferred(name, command), help=command.help)(_placeholder)


def _deferred(name: str, command: LazyCommand) -> type[TyperCommand]:
    class Deferred(TyperCommand):
        """Loads the real command when its arguments are parsed."""

        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            return command.load(name).make_context(info_name, args, parent=parent, **extra)

    return Deferred


def _placeholder() -> None:
    raise AssertionError("the real command runs instead of this one")
