"""`arriero blocks templates`: sets of memory blocks, listed, shown, stored from files and removed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
import yaml

from app.cli import texts
from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, print_text, settings_of, table
from app.kernel.errors import InvalidInput, Problem
from app.workflows.language import source
from app.workflows.language.source import SourceDocument

app = typer.Typer(invoke_without_command=True, help="List templates: sets of blocks that are created together.")

#: Most bytes of standard input, and the form of a file.
_MAX_BYTES = 1024 * 1024
_ACCEPTED = "`name` and `blocks`, or a list of such templates under `templates`"
_FIELDS = {"name", "blocks", "updated_at"}

_TemplateName = Annotated[str, typer.Argument(metavar="TEMPLATE", help="The name of a template.")]


@app.callback()
def list_templates(context: typer.Context, as_json: AsJson = False) -> None:
    """List templates: sets of blocks that are created together."""
    if context.invoked_subcommand is not None:
        return
    with connected(settings_of(context)) as client:
        found = client.get("/v1/block-templates")
    if as_json:
        print_json(found)
        return
    printed = table(("template", "blocks", "from"))
    for row in found["templates"]:
        labels = ", ".join(one["label"] for one in row["blocks"])
        printed.add_row(row["name"], labels, "namespace" if row["updated_at"] else "arriero")
    console().print(printed)


@app.command()
def show(context: typer.Context, template: _TemplateName, as_json: AsJson = False) -> None:
    """Print a template as a file that `apply` reads."""
    with connected(settings_of(context)) as client:
        found = client.get(_path(template))
    if as_json:
        print_json(found)
        return
    document = {"name": found["name"], "blocks": found["blocks"]}
    print_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100).rstrip())


@app.command()
def apply(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file in YAML or JSON; - for standard input.")],
    as_json: AsJson = False,
) -> None:
    """
    Store the templates of a file, each in the place of one with its name. Blocks that were created stay.

    A template has a name and blocks; several stand in a list under `templates`.
    """
    documents = _documents(file)
    with connected(settings_of(context)) as client:
        stored = [client.put(_path(name), {"blocks": blocks}) for name, blocks in documents.items()]
    if as_json:
        print_json({"templates": stored})
        return
    for one in stored:
        labels = ", ".join(block["label"] for block in one["blocks"])
        typer.echo(f"{one['name']} is stored: {labels}")


@app.command()
def delete(context: typer.Context, template: _TemplateName) -> None:
    """Remove a template that was stored. Blocks that were created stay."""
    with connected(settings_of(context)) as client:
        client.delete(_path(template))
    typer.echo(f"{template} is removed")


def _documents(file: str) -> dict[str, Any]:
    """The blocks of the templates of a file, by name. Nothing is stored if one of them has a wrong form."""
    text = sys.stdin.read(_MAX_BYTES) if file == "-" else texts.read(Path(file))
    document = source.read(text)
    data = document.data
    several = isinstance(data, Mapping) and "templates" in data
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    listed = data["templates"] if several else [data]
    if not isinstance(listed, list) or not listed:
        raise InvalidInput([_problem(document, "templates", "it is no list of templates", _ACCEPTED)], "template")
    for place, one in enumerate(listed):
        where = f"templates[{place}]" if several else ""
        if not isinstance(one, Mapping) or not isinstance(one.get("name"), str) or "blocks" not in one:
            problems.append(_problem(document, where, "it is no template", _ACCEPTED))
        elif unknown := sorted(set(one) - _FIELDS):
            problems.append(_problem(document, where, f"unknown fields: {', '.join(unknown)}", _ACCEPTED))
        elif one["name"] in found:
            problems.append(_problem(document, where, f"the name {one['name']!r} occurs twice", "a name for each"))
        else:
            found[one["name"]] = one["blocks"]
    if problems:
        raise InvalidInput(problems, "template")
    return found


def _problem(document: SourceDocument, where: str, message: str, accepted: str) -> Problem:
    return Problem(where, message, accepted, document.line(where))


def _path(template: str) -> str:
    return f"/v1/block-templates/{quote(template, safe='')}"
