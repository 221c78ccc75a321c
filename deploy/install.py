"""
Installs Arriero into the virtual environment whose Python runs this, and shows how far it is: `make` calls it.

pip is silent while it compiles llama.cpp, which takes minutes. Its output is logged; a line here says what it does,
how many files are compiled, and the time. At a terminal the line is rewritten. Elsewhere there is a line for each
phase, and one every 15 seconds. When the installation fails, the end of the log is shown.
The choice of the packages is pip's, and so is the cache of compiled wheels.

`python deploy/install.py LOG REQUIREMENT…`; CMAKE_ARGS in the environment follow the options of llama.cpp's build here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

#: Seconds between two lines where lines are not rewritten, and between two updates of the line of a terminal.
PLAIN_EVERY, LIVE_EVERY = 15.0, 0.5
#: Lines of the log that are shown after a failure.
SHOWN_LINES = 40
#: Most characters of a line of a terminal.
WIDTH = 79

#: Options of llama.cpp's build: only the libraries that Arriero calls. libmtmd reads images; it needs no video.
OPTIONS = (
    "-DLLAVA_BUILD=ON",
    "-DMTMD_VIDEO=OFF",
    f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={Path(__file__).resolve().parent / 'llama-cpp.cmake'}",
)

PACKAGES, COMPILING = "choosing and downloading packages", "compiling llama.cpp"

_NAME = r"([A-Za-z0-9._-]+)"
_COLLECTING = re.compile(rf"Collecting {_NAME}")
_DOWNLOADING = re.compile(r"\s*Downloading (?:\S*/)?([^/\s]+) \(([\d.]+ ?[kMG]?B)\)")
_BUILDING = re.compile(rf"\s*Building (?:wheel|editable) for {_NAME}")
#: Without the indent of the packages that only a build needs.
_INSTALLING = re.compile(r"Installing collected packages: (.*)")
_NINJA = re.compile(r"\s*\[(\d+)/(\d+)\]")
_MAKE = re.compile(r"\s*\[\s*(\d+)%\]")
_CACHED = re.compile(r"\s*Using cached (llama_cpp_python-\S+\.whl)")


class Progress:
    """What the installation does now, read from pip's output."""

    def __init__(self) -> None:
        self.phase = "starting pip"
        #: How far the phase is.
        self.detail = ""
        self._packages = 0

    def read(self, line: str) -> None:
        """Take a line of pip's output."""
        if found := _NINJA.match(line):
            done, total = int(found[1]), int(found[2])
            self.detail = f"{done} of {total} files, {100 * done // max(total, 1)} %"
        elif found := _MAKE.match(line):
            self.detail = f"{found[1]} %"
        elif found := _COLLECTING.match(line):
            self._packages += 1
            self._set(PACKAGES, f"{self._packages}, now {found[1]}")
        elif found := _DOWNLOADING.match(line):
            self._set(PACKAGES, f"{self._packages}, now {found[1]} ({found[2]})")
        elif _CACHED.match(line):
            self._set(PACKAGES, f"{self._packages}; llama.cpp was compiled earlier")
        elif found := _BUILDING.match(line):
            compiles = found[1].replace("-", "_") == "llama_cpp_python"
            if self.phase != COMPILING or not compiles:
                self._set(COMPILING if compiles else f"building {found[1]}", "")
        elif found := _INSTALLING.match(line):
            self._set("installing", f"{found[1].count(',') + 1} packages")

    def _set(self, phase: str, detail: str) -> None:
        self.phase, self.detail = phase, detail

    def __str__(self) -> str:
        return f"{self.phase}: {self.detail}" if self.detail else self.phase


class Display:
    """The line of a terminal, or lines elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._live = out, out.isatty() and os.environ.get("TERM") != "dumb"
        self._began = time.monotonic()
        self._phase, self._shown = "", self._began

    def show(self, progress: Progress) -> None:
        """Show the progress, where it is time for it."""
        now, text = time.monotonic(), str(progress)
        if self._live:
            self._out.write(f"\r{f'{self.elapsed()}  {text}'[:WIDTH]:<{WIDTH}}")
        elif progress.phase != self._phase or now - self._shown >= PLAIN_EVERY:
            self._out.write(f"{self.elapsed()}  {text}\n")
            self._phase, self._shown = progress.phase, now
        self._out.flush()

    def end(self, text: str) -> None:
        """Show the last line."""
        self._out.write(f"\r{' ' * WIDTH}\r{text}\n" if self._live else f"{text}\n")
        self._out.flush()

    def elapsed(self) -> str:
        """The time since the beginning, in minutes and seconds."""
        seconds = round(time.monotonic() - self._began)
        return f"{seconds // 60}:{seconds % 60:02}"


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of pip. Options of the user come last, so that they prevail."""
    return {
        **given,
        "CMAKE_ARGS": " ".join((*OPTIONS, given.get("CMAKE_ARGS", ""))).strip(),
        # Without Ninja, one file at a time would be compiled by make; pip gets it for the build.
        "SKBUILD_NINJA_MAKE_FALLBACK": given.get("SKBUILD_NINJA_MAKE_FALLBACK", "false"),
        "CMAKE_BUILD_PARALLEL_LEVEL": given.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1)),
        "PYTHONUNBUFFERED": "1",
    }


def install(log: Path, arguments: Sequence[str], out: TextIO) -> int:
    """Run `pip install` with the arguments, and show its progress. Returns its exit code."""
    return run(log, ["install", *arguments], out, "installation", "installed")


def run(log: Path, arguments: Sequence[str], out: TextIO, name: str, done: str) -> int:
    """Run pip with the arguments, and show its progress. `name` and `done` are for its last line. Returns its code."""
    command = [sys.executable, "-m", "pip", arguments[0], "-v", "--disable-pip-version-check", *arguments[1:]]
    progress, display = Progress(), Display(out)
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            command,
            env=environment(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as pip,
    ):
        assert pip.stdout is not None

        def read(stream: TextIO) -> None:
            for line in stream:
                kept.write(line)
                if line.strip():
                    last.append(line)
                progress.read(line)

        reader = threading.Thread(target=read, args=(pip.stdout,))
        reader.start()
        try:
            while reader.is_alive():
                display.show(progress)
                reader.join(LIVE_EVERY)
        except KeyboardInterrupt:
            pip.terminate()
            reader.join()
            display.end(f"interrupted after {display.elapsed()}")
            return 130
    if pip.returncode:
        display.end(f"the {name} failed after {display.elapsed()}. The end of {log}:\n")
        out.writelines(last)
        out.flush()
        return pip.returncode
    display.end(f"{done} in {display.elapsed()}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python deploy/install.py LOG REQUIREMENT…")
    sys.exit(install(Path(sys.argv[1]), sys.argv[2:], sys.stderr))
