"""`arriero self-check`: whether what is installed here works, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from app.cli.doctor import installed, machine
from app.cli.doctor.report import Check, findings_of, report
from app.cli.output import AsJson, settings_of
from app.kernel import log

#: The checks, from what is installed to what the settings ask for.
CHECKS: Mapping[str, Check] = {
    "python": installed.python,
    "packages": installed.packages,
    "files": installed.shipped_files,
    "settings": installed.known_settings,
    "disk": machine.disk,
    "ports": installed.ports,
    "devices": machine.drivers,
    "engine": installed.engine,
    "servers": installed.servers,
    "models": machine.models,
}


def self_check(
    context: typer.Context,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as problems.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Check an installation before it runs: packages, files, disk, ports, devices, engine, servers and models.

    The engine loads a tiny model, which is made for this, and generates with it. Embedded servers are started in a
    temporary directory; servers of the settings are called. Nothing of it stays. `arriero doctor` checks what runs.
    Exits with 0 when Arriero can run here, with 1 when there is a problem.
    """
    settings = settings_of(context)
    log.configure(settings.log.model_copy(update={"level": "error"}))  # warnings would repeat the printed lines
    raise typer.Exit(report(findings_of(CHECKS, settings), strict=strict, as_json=as_json))
