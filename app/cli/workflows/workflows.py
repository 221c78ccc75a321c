"""`arriero workflows`: list, show, store, check, compare, begin and pause workflows."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.catalog import files
from app.cli import texts
from app.cli.client import connected
from app.cli.output import AsJson, console, named, notes, print_json, settings_of, table
from app.cli.starters import workflows as starters
from app.cli.starters.files import SCHEMA_FILE, report, schema_text, write
from app.cli.starters.workflows import StarterKind
from app.cli.workflows.diff import print_changes
from app.kernel.errors import InvalidDefinition, InvalidInput, NotFound, Problem
from app.workflows.language import check as checks
from app.workflows.language import diff as differences
from app.workflows.language import schema as schemas
from app.workflows.language import source
from app.workflows.language.check import Deployment
from app.workflows.language.definition import Definition

app = typer.Typer(no_args_is_help=True, help="Workflows: list, show, store, check, compare, begin.")

WorkflowName = Annotated[str, typer.Argument(metavar="NAME", help="The name of a workflow.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A workflow in YAML or JSON.")]


@app.command("list")
def list_workflows(context: typer.Context, as_json: AsJson = False) -> None:
    """List the newest version of each workflow. Version 0 is shipped with Arriero."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/workflows")
    if as_json:
        print_json(found)
        return
    printed = table(("workflow", "version", "steps", "inputs", "models", "description"), right=("version", "steps"))
    for row in found["workflows"]:
        inputs, models = ", ".join(row["inputs"]), ", ".join(row["models"])
        printed.add_row(named(row), str(row["version"]), str(row["steps"]), inputs, models, row["description"])
    console().print(printed)


@app.command()
def show(
    context: typer.Context,
    name: WorkflowName,
    version: Annotated[int | None, typer.Option(help="A version; by default the newest.")] = None,
) -> None:
    """Print a workflow as JSON: its definition and its versions."""
    with connected(settings_of(context)) as client:
        print_json(client.get(f"/v1/workflows/{name}", version=version))


@app.command()
def put(context: typer.Context, file: File, as_json: AsJson = False) -> None:
    """Store a workflow as the newest version of its name. Nothing changes when it equals the newest version."""
    text = texts.read(file)
    name = checks.parse(text).workflow
    with connected(settings_of(context)) as client:
        stored = client.put_text(f"/v1/workflows/{name}", text, "application/yaml")
    if as_json:
        print_json(stored)
    else:
        typer.echo(f"{stored['name']} version {stored['version']}")


@app.command()
def check(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|FOLDER…", help="Workflows in YAML or JSON; for a folder, all in it and its subfolders."
        ),
    ],
) -> None:
    """
    Check workflows without a server: graphs, templates, expressions, schemas and models.

    Every problem is printed with its path, its line and what would be accepted; the exit code is then 2. Other YAML and
    JSON files in a folder are reported and skipped.
    """
    deployment = Deployment(files.catalog_of(settings_of(context)))
    if len(paths) == 1 and not paths[0].is_dir():
        typer.echo(_summary(checks.parse(texts.read(paths[0]), deployment)))
        return
    invalid = 0
    for path, listed in _found(paths):
        try:
            document = source.read(texts.read(path))
            if listed and not _is_workflow(document.data):
                notes().print(f"{path}: not a workflow, skipped", style="dim", markup=False, soft_wrap=True)
                continue
            typer.echo(f"{path}: {_summary(checks.check(document, deployment))}")
        except InvalidDefinition as error:
            invalid += 1
            for problem in error.problems:
                notes().print(f"{path}: {problem}", style="red", markup=False, soft_wrap=True)
    if invalid:
        raise typer.Exit(2)


@app.command()
def diff(
    context: typer.Context,
    subject: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A workflow, or a file to compare with one.")],
    old: Annotated[
        str | None,
        typer.Argument(metavar="[OLD]", help="A version; by default the one before NEW. For a file: the NAME."),
    ] = None,
    new: Annotated[str | None, typer.Argument(metavar="[NEW]", help="A version; by default the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """
    Show what changed between two versions, or from the newest version to a file.

    Steps are matched by id, independent of their order.
    """
    is_file = "." in subject or "/" in subject
    with connected(settings_of(context)) as client:
        if is_file:
            definition = checks.parse(texts.read(Path(subject)))
            stored = client.get(f"/v1/workflows/{old or definition.workflow}")
            changes = differences.between(stored["definition"], definition.document())
            found = {"name": stored["name"], "old": stored["version"], "new": subject}
            found["changes"] = [dataclasses.asdict(change) for change in changes]
        else:
            numbers = {"old": _number(old, "OLD"), "new": _number(new, "NEW")}
            found = client.get(f"/v1/workflows/{subject}/diff", **numbers)
    if as_json:
        print_json(found)
        return
    later = found["new"] if is_file else f"version {found['new']}"
    console().print(f"{found['name']}: version {found['old']} → {later}", style="bold")
    print_changes(found["changes"])


@app.command()
def new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the workflow: NAME.yaml is written.")],
    kind: Annotated[
        StarterKind,
        typer.Option(
            help="generate: a text and a title. map: a list, item by item. extract: fields out of a text. "
            "approve: a person decides."
        ),
    ] = StarterKind.GENERATE,
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where to write it.", file_okay=False)] = Path(),
    model: Annotated[str | None, typer.Option(help="Its model; by default the first of pools.models.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """
    Write a small commented workflow to begin with, and its JSON Schema for editors.

    Both are complete: the workflow passes `check` and runs as it is.
    """
    settings = settings_of(context)
    catalog = files.catalog_of(settings)
    text = starters.text(kind, name, model or starters.model_for(settings.pools.models, catalog))
    checks.parse(text, Deployment(catalog))
    file = folder / f"{name}.yaml"
    found = {file: text, folder / SCHEMA_FILE: schema_text()}
    following = [f"arriero {command} {shlex.quote(str(file))}" for command in ("workflows check", "run")]
    typer.echo(report(found, write(found, replace=force), following))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a workflow, for editors and other programs."""
    print_json(dict(schemas.workflow()))


@app.command()
def pause(context: typer.Context, name: WorkflowName, as_json: AsJson = False) -> None:
    """Pause a workflow: no further step of its runs starts, of future runs either."""
    _post(context, name, "pause", as_json)


@app.command()
def resume(context: typer.Context, name: WorkflowName, as_json: AsJson = False) -> None:
    """Resume the runs of a paused workflow."""
    _post(context, name, "resume", as_json)


def _post(context: typer.Context, name: str, what: str, as_json: bool) -> None:
    with connected(settings_of(context)) as client:
        answer = client.post(f"/v1/workflows/{name}/{what}")
    if as_json:
        print_json(answer)
    else:
        typer.echo(f"{name} is {'paused' if answer['paused'] else 'resumed'}: {answer['runs']} open runs")


def _summary(definition: Definition) -> str:
    models = ", ".join(definition.models())
    return (
        f"{definition.workflow} can run: {len(definition.steps)} steps, {f'models {models}' if models else 'no model'}"
    )


def _found(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield the files, each with whether it was found in a folder. Raises NotFound for a folder without files."""
    for path in paths:
        if not path.is_dir():
            yield path, False
            continue
        every = (inner for suffix in ("yaml", "yml", "json") for inner in path.rglob(f"*.{suffix}"))
        found = sorted(inner for inner in every if inner.name != SCHEMA_FILE)
        if not found:
            raise NotFound("YAML or JSON file in", str(path))
        yield from ((inner, True) for inner in found)


def _is_workflow(data: Any) -> bool:
    """Whether the document is a workflow. A schedule has a key `workflow` too."""
    return isinstance(data, dict) and "workflow" in data and "schedule" not in data


def _number(text: str | None, name: str) -> int | None:
    if text is not None and not text.isdecimal():
        raise InvalidInput([Problem(name, f"{text!r} is not a version", "a number")], "version")
    return None if text is None else int(text)
