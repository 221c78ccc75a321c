"""A whole `arriero up` on temporary data, for benchmarks over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.engine_runs import model_path

_ROOT = Path(__file__).parent.parent
MODEL = "smollm2:135m"
_CATALOG = f"""
[[models]]
name = "{MODEL}"
use_cases = ["chat"]
context = CONTEXT
slots = SLOTS

[models.source]
path = "PATH"

[models.engine]
threads = THREADS

[models.pools]
max = 1
"""


@dataclass(frozen=True, slots=True)
class Up:
    """A running `arriero up`."""

    url: str
    process: subprocess.Popen[bytes]
    #: Its data directory.
    data: Path

    def processes(self) -> dict[str, psutil.Process]:
        """Its programs by name: `api`, `pool`, `valkey-server`."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            words = " ".join(child.cmdline()).split()
            if any(module in words[:-1] for module in ("app", "workers.programs")):
                found[words[words.index("-m") + 2]] = child
            elif words and words[0].endswith("valkey-server"):
                found["valkey"] = child
        return found


@contextmanager
def up(
    *, threads: int, slots: int, context: int, options: Sequence[str] = (), catalog: str = "", more: str = ""
) -> Iterator[Up]:
    """The platform with one model, which is resident, and `more` entries; or with those of another catalogue."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # an embedded server that root starts as another user reaches its files
        file = Path(folder, "catalog.toml")
        values = {"PATH": str(model_path()), "CONTEXT": str(context), "SLOTS": str(slots), "THREADS": str(threads)}
        content = _CATALOG
        for name, value in values.items():
            content = content.replace(name, value)
        file.write_text(catalog or content + more)
        api, flower = free_port(), free_port()
        given = [
            f"--data-dir={folder}/data",
            f"--set=api.port={api}",
            f"--set=flower.port={flower}",
            f"--set=catalog.files=[{json.dumps(str(file))}]",
            *(f"--set={option}" for option in options),
        ]
        log = Path(folder, "up.log")
        with log.open("wb") as out:
            process = subprocess.Popen([sys.executable, "-m", "app", *given, "up"], stdout=out, stderr=out, cwd=_ROOT)
        try:
            while "arriero is up" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield Up(f"http://127.0.0.1:{api}", process, Path(folder, "data"))
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
