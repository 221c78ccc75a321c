"""Files that commands are given."""

from __future__ import annotations

from pathlib import Path

from app.kernel.errors import InvalidInput, NotFound, Problem


def read(file: Path) -> str:
    """Return the text of a file. Raises NotFound for what is no file, InvalidInput for one that is no readable text."""
    if not file.is_file():
        raise NotFound("file", str(file))
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"it is no UTF-8 text (byte {error.start})"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
    raise InvalidInput([Problem(str(file), reason, "a text in UTF-8")], "file")
