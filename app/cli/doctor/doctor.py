"""`arriero doctor`: checks an installation from the machine to the pools, and says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from app.cli.doctor import machine, servers
from app.cli.doctor.report import Check, findings_of, report
from app.cli.output import AsJson, settings_of
from app.kernel import log

#: The checks in the order in which one depends on the other.
CHECKS: Mapping[str, Check] = {
    "drivers": machine.drivers,
    "disk": machine.disk,
    "ports": machine.ports,
    "models": machine.models,
    "database": servers.database,
    "broker": servers.valkey,
    "components": servers.running,
}


def doctor(
    context: typer.Context,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as problems.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Check drivers, disk, ports, models, database, schema, broker, clocks and components, and say what to do.

    It changes nothing, and works while parts are down. Exits with 0 when nothing is wrong, with 1 when there is a
    problem.
    """
    settings = settings_of(context)
    log.configure(settings.log.model_copy(update={"level": "error"}))  # warnings would repeat the printed lines
    raise typer.Exit(report(findings_of(CHECKS, settings), strict=strict, as_json=as_json))
