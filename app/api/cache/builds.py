"""The build of a model: what identifies its file, its options and the engine, for the keys of cached answers."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from app.catalog import files
from app.catalog.model import Model
from app.devices import llama_build
from app.kernel.errors import ModelFileUnusable

#: Seconds after which the files of a model are looked at again.
_VALID = 5.0


class Builds:
    """The builds of the catalogue's models. A file that is not on this host is known by its entry alone."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._known: dict[str, tuple[float, Model, str]] = {}

    def of(self, model: Model) -> str:
        """The build of a model: another file or another option of its entry gives another one."""
        known = self._known.get(model.name)
        if known is not None and known[1] is model and time.monotonic() < known[0]:
            return known[2]
        content = f"{llama_build.build()}\n{model.model_dump_json(exclude={'description', 'licence', 'pools'})}\n"
        build = hashlib.sha256((content + "\n".join(self._files(model))).encode()).hexdigest()
        self._known[model.name] = (time.monotonic() + _VALID, model, build)
        return build

    def _files(self, model: Model) -> list[str]:
        try:
            paths = files.file_paths(model, self._data_dir)
        except ModelFileUnusable:
            return []
        found = []
        for path in paths:
            try:
                status = path.stat()
            except OSError:
                continue
            found.append(f"{path} {status.st_size} {status.st_mtime_ns}")
        return found
