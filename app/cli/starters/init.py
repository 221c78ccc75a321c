"""`arriero init`: a folder to begin with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from app.catalog import files as catalogs
from app.cli.output import settings_of
from app.cli.starters import config_file, workflows
from app.cli.starters.files import SCHEMA_FILE, report, schema_text, write
from app.cli.starters.workflows import StarterKind
from app.kernel.settings import CONFIG_FILE

#: The name of the first workflow.
_FIRST = "first"

Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]


def init(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder; it is created if it does not exist.", file_okay=False)
    ] = Path(),
    force: Force = False,
) -> None:
    """
    Write a commented arriero.toml and a first workflow into a folder.

    Files that exist are not changed, except with --force.
    """
    settings = settings_of(context)
    model = workflows.model_for(settings.pools.models, catalogs.catalog_of(settings))
    first = folder / f"{_FIRST}.yaml"
    texts = {
        folder / CONFIG_FILE: config_file.text(),
        first: workflows.text(StarterKind.GENERATE, _FIRST, model),
        folder / SCHEMA_FILE: schema_text(),
    }
    following = [
        *([] if folder == Path() else [f"cd {shlex.quote(str(folder))}"]),
        "arriero up                              # in another terminal, in the same folder",
        f"arriero run {first.name} --input subject='a bridge'",
        "arriero workflows new NAME --kind map   # or extract, approve, refine",
    ]
    typer.echo(report(texts, write(texts, replace=force), following))
