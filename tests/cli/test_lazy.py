"""Lazy commands: modules are imported when a command runs; names and help lines are available before."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from app.cli import COMMANDS
from app.cli.fleet import models
from app.cli.fleet.footprint import footprint
from app.cli.fleet.pulls import pull, rm, verify

#: Packages that only servers and commands with database access need.
HEAVY = ("alembic", "celery", "fastapi", "jsonschema", "llama_cpp", "psycopg", "sqlalchemy", "uvicorn")


def imported_by(*arguments: str) -> set[str]:
    """Return the heavy packages that a command imports."""
    program = (
        "import json, sys\nfrom app.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stderr.splitlines()[-1]))


def test_the_help_line_of_a_lazy_command_in_a_group_equals_its_docstring() -> None:
    helps = {command.name: command.help for command in models.app.registered_commands}
    for function in (footprint, pull, rm, verify):
        assert helps[function.__name__] == inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_line_in_the_table_equals_that_of_the_command(name: str) -> None:
    command = COMMANDS[name].load(name)

    assert command.name == name
    assert COMMANDS[name].help == command.help.split("\n\n")[0].replace("\n", " ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("runs", "--help"),
        ("runs", "list"),
        ("models", "list"),
        ("batches", "list"),
        ("files", "list"),
        ("fleet", "why", "m"),
        ("config", "show"),
    ],
)
def test_a_command_imports_only_what_it_needs(arguments: tuple[str, ...]) -> None:
    database = "database_url=postgresql://a:b@one:1,two:2/c?sslmode=verify-full"
    assert imported_by("--set", "api.port=1", "--set", database, *arguments) == set()


def test_heavy_packages_are_detected() -> None:
    """Show that the test above can fail."""
    assert {"fastapi", "sqlalchemy"} <= imported_by("api", "--help")
