"""`arriero doctor`: checks an installation from the machine to the pools, and says what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from app.cli.doctor import machine, servers
from app.cli.doctor.finding import Finding, Level, exit_code, problem
from app.cli.output import AsJson, console, print_json, settings_of, table
from app.kernel import log
from app.kernel.errors import ArrieroError
from app.kernel.security.texts import printable
from app.kernel.settings import Settings

_log = log.get(__name__)

#: The checks in the order in which one depends on the other.
CHECKS: Mapping[str, Callable[[Settings], Iterator[Finding]]] = {
    "drivers": machine.drivers,
    "disk": machine.disk,
    "ports": machine.ports,
    "models": machine.models,
    "database": servers.database,
    "broker": servers.valkey,
    "components": servers.running,
}
_STYLES = {
    Level.OK: "green",
    Level.WARNING: "yellow",
    Level.PROBLEM: "bold red",
    Level.SKIPPED: "dim",
}
#: Most characters of a detail that is printed.
_WIDTH = 500


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
    findings = [finding for name, check in CHECKS.items() for finding in _checked(name, check, settings)]
    code = exit_code(findings, strict=strict)
    if as_json:
        counts = Counter(str(one.severity) for one in findings)
        print_json({"ok": code == 0, "counts": counts, "findings": [asdict(one) for one in findings]})
    else:
        _print(findings)
    raise typer.Exit(code)


def _checked(name: str, check: Callable[[Settings], Iterator[Finding]], settings: Settings) -> list[Finding]:
    found = []
    try:
        for finding in check(settings):
            found.append(finding)  # noqa: PERF402 what was found before an error is kept
    except ArrieroError as error:
        found.append(problem(name, str(error), "see the message"))
    except Exception as error:  # noqa: BLE001 the outermost loop: a check that breaks must not hide the others
        _log.exception("check_failed", check=name)
        found.append(problem(name, f"the check itself failed: {type(error).__name__}: {error}", "please report it"))
    return found


def _print(findings: list[Finding]) -> None:
    printed = table(("", "check", "finding"))
    for one in findings:
        detail = Text(printable(one.detail)[:_WIDTH])
        if one.remedy:
            detail.append(f"\n→ {one.remedy}", style="dim")
        printed.add_row(Text(one.severity, _STYLES[one.severity]), one.check, detail)
    console().print(printed)
    counts = Counter(one.severity for one in findings)
    problems, warnings = counts[Level.PROBLEM], counts[Level.WARNING]
    summary = f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    console().print()
    console().print(summary if problems or warnings else "nothing is wrong")
