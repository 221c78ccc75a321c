"""Commands are loaded when they run, and their names and help are known before."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from app.cli import COMMANDS, models
from app.cli.footprint import footprint

#: What only programs that serve, or that open the database, need.
HEAVY = ("alembic", "celery", "fastapi", "jsonschema", "llama_cpp", "psycopg", "sqlalchemy", "uvicorn")


def imported_by(*arguments: str) -> set[str]:
    """The heavy packages that a command imports."""
    program = (
        "import json, sys\nfrom app.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stderr.splitlines()[-1]))


def test_the_line_of_help_of_a_command_in_a_group_is_its_own() -> None:
    command = models.app.registered_commands[0]

    assert command.help == inspect.cleandoc(footprint.__doc__ or "").split("\n\n")[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_help_is_that_of_the_command(name: str) -> None:
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
        ("fleet", "why", "m"),
        ("config", "show"),
    ],
)
def test_a_command_imports_only_what_it_needs(arguments: tuple[str, ...]) -> None:
    assert imported_by("--set", "api.port=1", *arguments) == set()


def test_the_heavy_packages_are_found_where_they_are_imported() -> None:
    """The test above would see them."""
    assert {"fastapi", "sqlalchemy"} <= imported_by("api", "--help")
