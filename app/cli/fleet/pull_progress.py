"""The progress of downloads: bars at a terminal, lines elsewhere, with rate and remaining time."""

from __future__ import annotations

import time
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from app.catalog.install import FileProgress, InstallState, format_bytes
from app.cli.output import seconds

#: Per cent, and seconds, after which another plain line is printed.
_STEP, _PAUSE = 10, 10.0
#: Seconds after which a rate is shown.
_LEAST = 0.5


class PullProgress:
    """Shows the progress of the files of one pull."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        #: The state, the percentage step and the detail of the last plain line, by file; and when it was printed.
        self._printed: dict[str, tuple[InstallState, int, str]] = {}
        self._printed_at: dict[str, float] = {}
        #: Where the transfer of a file began: the instant and the bytes.
        self._began: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> PullProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def report(self, progress: FileProgress) -> None:
        """Show a progress. It is called for each received block."""
        if self._console.is_terminal:
            self._draw(progress)
        else:
            self._print(progress, time.monotonic())

    def _draw(self, progress: FileProgress) -> None:
        if progress.file not in self._tasks:
            self._tasks[progress.file] = self._bar.add_task(progress.file, total=None)
        text = f"{progress.file} {progress.state}" + (f" ({progress.detail})" if progress.detail else "")
        self._bar.update(self._tasks[progress.file], completed=progress.done, total=progress.total, description=text)

    def _print(self, progress: FileProgress, at: float) -> None:
        name = progress.file
        transfers = progress.state is InstallState.DOWNLOADING
        if not transfers:
            self._began.pop(name, None)
        began, first = self._began.setdefault(name, (at, progress.done)) if transfers else (at, progress.done)
        percent = 100 * progress.done // progress.total if progress.total else 0
        now = (progress.state, percent // _STEP, progress.detail)
        late = transfers and at - self._printed_at.get(name, at) > _PAUSE
        if self._printed.get(name) == now and not late:
            return
        self._printed[name], self._printed_at[name] = now, at
        total = f" of {format_bytes(progress.total)} ({percent} %)" if progress.total else ""
        rate = (progress.done - first) / (at - began) if at - began > _LEAST else 0.0
        speed = f", {format_bytes(round(rate))}/s" if rate else ""
        left = (
            f", {seconds((progress.total - progress.done) / rate)} left"
            if rate and progress.total and percent < 100
            else ""
        )
        detail = f": {progress.detail}" if progress.detail else ""
        line = f"{name}: {progress.state} {format_bytes(progress.done)}{total}{speed}{left}{detail}"
        self._console.print(Text(line), soft_wrap=True)
