"""Text files in the arguments of commands."""

from __future__ import annotations

from pathlib import Path

from app.kernel.errors import InvalidInput, NotFound, Problem


def read(file: Path) -> str:
    """Return the text of a file. Raises NotFound unless it is a regular file, InvalidInput unless it is UTF-8."""
    if not file.is_file():
        raise NotFound("file", str(file))
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text (byte {error.start})"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
    raise InvalidInput([Problem(str(file), reason, "a text in UTF-8")], "file")
