"""
A guard for loops over many: what breaks for one of them is logged, and the loop goes on with the next.

A defect that lasts is logged once, with its traceback, until it becomes another one or is gone.
Errors that concern all of them, such as a database that cannot be reached, are for the caller of the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from app.kernel import log

_log = log.get(__name__)

#: Defects that are remembered as logged, at the most.
_MOST = 1_000


class LoopGuard:
    """Guards the members of one loop, each by its kind and its id. Any thread may use it."""

    def __init__(self, *passing: type[Exception]) -> None:
        """`passing` are the errors that concern all members: they are raised on."""
        self._passing = passing
        self._logged: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    @contextmanager
    def one(self, kind: str, id_: str) -> Iterator[list[Exception]]:
        """Do something for one member; gives a list that holds what it raised, if it did."""
        failed: list[Exception] = []
        try:
            yield failed
        except self._passing:
            raise
        except Exception as error:  # noqa: BLE001 one of many does not stop the others
            failed.append(error)
            if self._is_new(kind, id_, f"{type(error).__name__}: {error}"):
                _log.exception("one_of_many_broke", kind=kind, id=id_)
        else:
            with self._lock:
                self._logged.pop((kind, id_), None)

    def _is_new(self, kind: str, id_: str, what: str) -> bool:
        with self._lock:
            known = self._logged.get((kind, id_))
            if known is None and len(self._logged) >= _MOST:
                self._logged.clear()
            self._logged[kind, id_] = what
        return known != what
