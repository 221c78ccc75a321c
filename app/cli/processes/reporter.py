"""
The lines of `arriero up` on standard error: each phase of the start with its time, then what happens.

At a terminal a last line shows what is being done now, and for how long. Elsewhere only whole lines are written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from app.cli.output import live, notes
from app.kernel import clock

_COLOURS = {"info": "green", "warning": "yellow", "error": "bold red"}
#: Columns of the name of a phase.
_WIDTH = 9


class Reporter:
    """Prints lines, and the phases of a start with their durations."""

    def __init__(self, *, with_time: bool = False) -> None:
        """Print from now on; `with_time` puts the time before each line, for a log."""
        self._with_time = with_time
        self._began = time.monotonic()
        #: By phase, when it began, by the monotonic clock.
        self._phases: dict[str, float] = {}
        self._live: Progress | None = None
        self._console = notes()

    def __call__(self, level: str, text: str) -> None:
        """Print a line in the colour of its level; further lines of the text are dimmed."""
        first, _, rest = text.partition("\n")
        self._print(f"[{_COLOURS[level]}]•[/] {escape(first)}")
        if rest:
            self._print(f"[dim]{escape(rest)}[/]")

    @property
    def seconds(self) -> float:
        """Seconds since its creation."""
        return time.monotonic() - self._began

    def begin(self, *phases: str) -> None:
        """Begin phases, whose time counts from now."""
        self._phases |= dict.fromkeys(phases, time.monotonic())
        self.show(", ".join(self._phases))

    def done(self, phase: str, text: str) -> None:
        """End a phase: print its result and the time that it took."""
        took = time.monotonic() - self._phases.pop(phase, self._began)
        self._print(f"[green]•[/] {phase:<{_WIDTH}} {escape(text)} [dim]({took:.1f} s)[/]")
        self.show(", ".join(self._phases))

    def note(self, phase: str, text: str) -> None:
        """Print a line about a phase that goes on."""
        self._print(f"[cyan]…[/] {phase:<{_WIDTH}} {escape(text)}")

    def show(self, doing: str) -> None:
        """Show what is being done now, at a terminal only. An empty text ends this."""
        if not doing:
            self.close()
            return
        if self._live is None:
            console = live()
            if not console.is_terminal or console.is_dumb_terminal:
                return
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._live = Progress(*columns, console=console, transient=True, refresh_per_second=4)
            self._live.add_task(escape(doing))
            self._live.start()
        self._live.update(self._live.task_ids[0], description=escape(doing))

    def close(self) -> None:
        """Remove the line that shows what is being done."""
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
            self._live = None

    def block(self, title: str, lines: Sequence[str]) -> None:
        """Print a title and lines with markup below it."""
        self.close()
        # At once: who waits for the title finds the lines too.
        self._print("\n".join([f"\n[bold green]{title}[/]", *(f"  {line}".rstrip() for line in lines)]))

    def _print(self, markup: str) -> None:
        console = self._console if self._live is None else self._live.console
        if self._with_time:
            now = f"{clock.now():%Y-%m-%dT%H:%M:%S.%f}Z"
            markup = "\n".join(f"{now} {line}" for line in markup.split("\n"))
        with suppress(OSError):  # a terminal that is closed must not prevent the stop
            console.print(markup, soft_wrap=True, highlight=False)
