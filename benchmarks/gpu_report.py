"""
The report of a verified GPU: what each section found, as JSON, and as Markdown for people.

A section writes its figures to a file as it finds them: what it found before it failed, or ran out of time, is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """What is verified, and how much is done for it."""

    model: str
    #: Devices of software, by their bytes; none for GPUs.
    software: tuple[int, ...] = ()
    #: Requests at a time, and tokens of each.
    streams: tuple[int, ...] = (1, 8, 32, 64)
    tokens: int = 128
    documents: int = 1000
    #: Configurations of footprints that are compared, and micro-batches of their largest.
    configurations: int = 32
    #: llama-server; empty without one.
    server: str = ""
    threads: int = 2

    @classmethod
    def of_json(cls, text: str) -> Target:
        """Return the target that `asdict` wrote."""
        values = json.loads(text)
        return cls(**values | {"software": tuple(values["software"]), "streams": tuple(values["streams"])})


@dataclass
class Section:
    """What one section found."""

    name: str
    title: str
    #: `ok`, `failed`, `out of time`: how it ended.
    state: str = "out of time"
    seconds: float = 0.0
    #: What was measured, with its value as text.
    figures: list[tuple[str, str]] = field(default_factory=list)
    #: What should hold, whether it did, and the figures of it.
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    #: What could not run here, and why.
    not_run: list[str] = field(default_factory=list)
    #: Why it failed.
    failure: str = ""


class Findings:
    """The section that runs in this process. Each finding is written at once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._section = Section("", "")

    def figure(self, what: str, value: str) -> None:
        """Add a measured value."""
        self._section.figures.append((what, value))
        self._write()

    def check(self, what: str, held: bool, detail: str = "") -> None:
        """Add what should hold."""
        self._section.checks.append((what, held, detail))
        self._write()

    def skip(self, why: str) -> None:
        """Add what cannot run here."""
        self._section.not_run.append(why)
        self._write()

    def _write(self) -> None:
        partial = self._file.with_suffix(".new")
        partial.write_text(json.dumps(asdict(self._section)))
        partial.replace(self._file)


def read(file: Path, name: str, title: str) -> Section:
    """Return what a section wrote; nothing, if it wrote nothing."""
    values: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    section = Section(name, title)
    section.figures = [(what, value) for what, value in values.get("figures", [])]
    section.checks = [(what, held, detail) for what, held, detail in values.get("checks", [])]
    section.not_run = list(values.get("not_run", []))
    return section


def markdown(head: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Return the report for people."""
    held = sum(one[1] for section in sections for one in section.checks)
    total = sum(len(section.checks) for section in sections)
    lines = [f"# {dict(head)['devices']}: verified", "", *(f"- {name}: {value}" for name, value in head)]
    lines += ["", f"{held} of {total} checks held.", ""]
    for section in sections:
        ending = "" if section.state == "ok" else f", {section.state}"
        lines += [f"## {section.title}", "", f"{section.seconds:.0f} s{ending}", ""]
        if section.failure:
            lines += ["Failure:", "", *(f"    {line}" for line in section.failure.splitlines()), ""]
        if section.figures:
            lines += ["| measured | |", "|---|---|"]
            lines += [f"| {_cell(what)} | {_cell(value)} |" for what, value in section.figures] + [""]
        if section.checks:
            lines += ["| should hold | held | |", "|---|---|---|"]
            lines += [
                f"| {_cell(what)} | {'yes' if held else '**no**'} | {_cell(detail)} |"
                for what, held, detail in section.checks
            ] + [""]
        lines += [f"- Not run: {why}" for why in section.not_run]
        lines += [""] * bool(section.not_run)
    return "\n".join(lines).rstrip() + "\n"


def size(bytes_: float) -> str:
    """Bytes for people."""
    if bytes_ < 2**20:
        return f"{bytes_ / 2**10:,.1f} KiB"
    return f"{bytes_ / 2**20:,.1f} MiB" if bytes_ < GIB else f"{bytes_ / GIB:,.2f} GiB"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
