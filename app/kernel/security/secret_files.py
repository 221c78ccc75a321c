"""
Secrets from files: `ARRIERO_DATABASE_URL_FILE` names a file with the value of the setting `database_url`.

Containers get secrets as files, so that no environment and no description of a container shows them. The name of the
variable is that of the setting's own with `_FILE`, for settings that are secrets only.

A file is read once, with the settings; line breaks at its end are removed. It never changes what the environment says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from app.kernel.errors import InvalidSettings, Problem

SUFFIX = "_FILE"
#: Most bytes of a file.
_MAX_BYTES = 65_536


def revealed(given: Mapping[str, str], secrets: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """
    Return the variables with values in the place of files, and by variable the one that names its file.

    `given` are variables in upper case, `secrets` the variables of secret settings. Raises InvalidSettings, without
    content of any file.
    """
    named = {name + SUFFIX: name for name in secrets if name + SUFFIX in given}
    problems = [Problem(file, f"{name} is set, too", "one of the two") for file, name in named.items() if name in given]
    values = {name: value for name, value in given.items() if name not in named}
    for file, name in named.items():
        try:
            values[name] = _read(Path(given[file]))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            problems.append(Problem(file, f"{given[file]}: {reason}", "a readable file with the value"))
    if problems:
        raise InvalidSettings(problems)
    return values, {name: file for file, name in named.items()}


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    try:
        text = content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if not text or "\0" in text:
        raise ValueError("it is empty" if not text else "it has a NUL byte")
    return text
