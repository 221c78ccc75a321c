"""Reports of findings: as a table with a summary, or as one JSON document. A check that breaks hides no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from rich.text import Text

from app.cli.doctor.finding import Finding, Level, exit_code, problem
from app.cli.output import console, print_json, table
from app.kernel import log
from app.kernel.errors import ArrieroError
from app.kernel.security.texts import printable
from app.kernel.settings import Settings

_log = log.get(__name__)

#: A check: what it finds with these settings.
Check = Callable[[Settings], Iterator[Finding]]

_STYLES = {
    Level.OK: "green",
    Level.WARNING: "yellow",
    Level.PROBLEM: "bold red",
    Level.SKIPPED: "dim",
}
#: Most characters of a detail that is printed.
_WIDTH = 500


def findings_of(checks: Mapping[str, Check], settings: Settings) -> list[Finding]:
    """Return what all checks find, in their order. An error of a check is a finding too."""
    return [finding for name, check in checks.items() for finding in _checked(name, check, settings)]


def report(findings: list[Finding], *, strict: bool, as_json: bool) -> int:
    """Print the findings. Returns the exit code: 1 when there is a problem, or with `strict` a warning."""
    code = exit_code(findings, strict=strict)
    if as_json:
        counts = Counter(str(one.severity) for one in findings)
        print_json({"ok": code == 0, "counts": counts, "findings": [asdict(one) for one in findings]})
    else:
        _print(findings)
    return code


def _checked(name: str, check: Check, settings: Settings) -> list[Finding]:
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
