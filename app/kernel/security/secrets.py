"""
Secrets: values for steps, which steps refer to by name and Arriero never stores.

A secret is the variable `ARRIERO_SECRET_<NAME>` of a worker, or a file in the directory `secrets_dir`; the variable has
precedence. Names are compared in lower case, and `-` and `.` in the name of a file are read as `_`.
A value is read at each use, so a change of the file takes effect at once.
Values are never written to rows, logs or messages.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from app.kernel import log, settings
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.security import masking

_log = log.get(__name__)

#: Most bytes of a file.
_MAX_BYTES = 65_536


class Secrets:
    """The secrets that are available to a process. There is one instance per process."""

    def __init__(self, directory: Path | None, environment: Mapping[str, str] | None = None) -> None:
        """`environment` defaults to the process's own."""
        self._directory, self._environment = directory, environment
        self._warned: set[Path] = set()

    def origins(self) -> list[tuple[str, str]]:
        """Return the name of each secret with its variable or file, without values."""
        files = self._files()
        found = [(name, settings.SECRET_PREFIX + name.upper()) for name in self._variables()]
        found += [(name, str(path)) for name, paths in files.items() for path in paths]
        return sorted(found)

    def reveal(self, names: Iterable[str]) -> dict[str, str]:
        """
        Return the values of secrets by the given names.

        Raises StepFailure with the reason `template_error` for a secret that does not exist or cannot be read.
        """
        return {name: self._reveal(name) for name in sorted(names)}

    def _reveal(self, name: str) -> str:
        value = self._variables().get(name.lower())
        if value is None:
            value = self._read(name)
        if len(value) < masking.MIN_CHARACTERS:
            least = masking.MIN_CHARACTERS
            raise _refused(f"the secret {name!r} has {len(value)} characters; {least} are needed to mask it")
        return value

    def _read(self, name: str) -> str:
        files = self._files()
        paths = files.get(name.lower(), ())
        if not paths:
            raise _refused(self._unknown(name))
        if len(paths) > 1:
            raise _refused(f"the secret {name!r} is in two files: {paths[0]} and {paths[1]}")
        try:
            self._check_file(paths[0])
            return paths[0].read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise _refused(f"the secret {name!r} cannot be read from {paths[0]}: {why}") from None

    def _check_file(self, path: Path) -> None:
        found = path.stat()
        if found.st_size > _MAX_BYTES:
            raise _refused(f"{path} has {found.st_size} bytes; a secret may have at most {_MAX_BYTES}")
        if found.st_mode & stat.S_IROTH and path not in self._warned:
            self._warned.add(path)
            _log.warning("secret_readable_by_all", path=str(path), mode=f"{stat.S_IMODE(found.st_mode):04o}")

    def _variables(self) -> dict[str, str]:
        return settings.secret_variables(self._environment)

    def _files(self) -> dict[str, list[Path]]:
        """Return the files of the directory by the names of their secrets. Hidden files belong to Kubernetes."""
        found: dict[str, list[Path]] = {}
        try:
            for path in sorted(self._directory.iterdir()) if self._directory and self._directory.is_dir() else ():
                name = path.name.lower().replace("-", "_").replace(".", "_")
                if settings.SECRET_NAME.fullmatch(name) and path.is_file():
                    found.setdefault(name, []).append(path)
        except OSError as error:
            raise _refused(f"secrets_dir ({self._directory}) cannot be read: {error.strerror}") from None
        return found

    def _unknown(self, name: str) -> str:
        known = ", ".join(dict.fromkeys(known for known, _ in self.origins())) or "none"
        if self._directory is None:
            place = "a file of the directory that the setting secrets_dir names (it is not set)"
        else:
            missing = "" if self._directory.is_dir() else ", which does not exist"
            place = f"the file {name.lower()} of secrets_dir ({self._directory}{missing})"
        variable = settings.SECRET_PREFIX + name.upper()
        return f"there is no secret {name!r} (there are: {known}); define a worker's variable {variable}, or {place}"


def _refused(message: str) -> StepFailure:
    return StepFailure(FailureReason.TEMPLATE_ERROR, message)
