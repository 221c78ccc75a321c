"""
The operator's key: with it, commands on the machine of `arriero up` call an API that needs keys.

Each start of `arriero up` writes a new one into a private file of the data directory and removes it at its end. Who can
read the file can also read the database beside it, so the key gives nobody more than they have. No row stores it.
"""

from __future__ import annotations

from pathlib import Path

from app.access import keys
from app.kernel import ids
from app.kernel.processes import private_file

_FILE = Path("run", "operator.key")
#: Most bytes of the file.
_MAX_BYTES = 256


def create(data_dir: Path) -> str:
    """Write a new key into the data directory, and return it. Raises OSError."""
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    key = keys.compose(key_id, secret)
    private_file.write(data_dir / _FILE, key)
    return key


def read(data_dir: Path) -> str | None:
    """Return the key in the data directory, or None when there is none that can be read."""
    try:
        with (data_dir / _FILE).open(encoding="utf-8") as file:
            text = file.read(_MAX_BYTES)
    except (OSError, UnicodeDecodeError):
        return None
    return text if keys.id_of(text) else None


def remove(data_dir: Path) -> None:
    """Remove the key."""
    (data_dir / _FILE).unlink(missing_ok=True)
