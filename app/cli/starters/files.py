"""
Files that a command writes for a user to go on with.

Nothing is written unless everything can be: a file that exists is replaced only when that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.kernel.errors import Conflict, InvalidInput, Problem
from app.workflows.language import schema

#: The name of the file with the JSON Schema of a workflow, which lies beside the workflows for editors.
SCHEMA_FILE = "workflow.schema.json"
#: The first line of a workflow: yaml-language-server, which most editors use, completes and checks by the schema.
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"


def schema_text() -> str:
    """Return the text of the schema file."""
    return json.dumps(schema.workflow(), indent=2, ensure_ascii=False) + "\n"


def write(texts: Mapping[Path, str], *, replace: bool) -> list[Path]:
    """
    Write files, and the folders that they need; returns those that were written. One with the same text is left alone.

    An earlier schema file of Arriero is replaced in any case. Raises Conflict when another file exists and `replace` is
    false, InvalidInput when a file cannot be written.
    """
    wanted = {path: text for path, text in texts.items() if _read(path) != text}
    taken = [path for path in wanted if path.exists() and not (replace and path.is_file()) and not _is_schema(path)]
    if taken:
        raise Conflict(f"{', '.join(map(str, taken))} exists already; --force replaces it")
    for path, text in wanted.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            reason = f"it cannot be written: {error.strerror or error}"
            raise InvalidInput([Problem(str(path), reason, "a folder that you may write to")], "file") from None
    return list(wanted)


def report(texts: Mapping[Path, str], written: Sequence[Path], following: Sequence[str]) -> str:
    """Return what to print: which files were written, and the commands that follow."""
    lines = [f"{'written' if path in written else 'unchanged'}: {path}" for path in texts]
    return "\n".join([*lines, "", "next:", *(f"  {command}" for command in following)])


def _read(path: Path) -> str | None:
    """Return the text of a file; None where there is none that can be read."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None


def _is_schema(path: Path) -> bool:
    """Whether a file is a schema that Arriero wrote."""
    return path.name == SCHEMA_FILE and f'"$id": "{schema.ID}"' in (_read(path) or "")
