"""
The state files of a host: the stored KV states of models that are no longer in the catalogue are removed.

Only files of the form that pools write are removed, in folders that are named like models; a folder that is empty then
goes too. Errors are logged: state files are no reason for an agent to stop.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from app.catalog.files import STATES_FOLDER
from app.kernel import log

_log = log.get(__name__)

_FOLDER = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FILE = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}\.kve?(\.tmp)?|[0-9a-f]{32}\.lock|\.lock")


def remove_unknown(data_dir: Path, slugs: Iterable[str]) -> None:
    """Remove the states of all models but those with these slugs."""
    known, root = set(slugs), data_dir / STATES_FOLDER
    try:
        folders = [one for one in root.iterdir() if _FOLDER.fullmatch(one.name) and one.name not in known]
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("state_files_not_removed", folder=str(root), error=str(error))
        return
    for folder in folders:
        if not folder.is_symlink() and folder.is_dir():
            _remove(folder)


def _remove(folder: Path) -> None:
    removed = 0
    try:
        for file in list(folder.iterdir()):
            if _FILE.fullmatch(file.name):
                file.unlink(missing_ok=True)
                removed += file.name != ".lock"
        with contextlib.suppress(OSError):
            folder.rmdir()
    except OSError as error:
        _log.warning("state_files_not_removed", folder=str(folder), error=str(error))
    _log.info("state_files_removed", folder=folder.name, files=removed)
