"""
A guard for loops: an exception for one item is logged, and the loop continues with the next item.

A lasting failure of an item is logged once, with its traceback, until its error changes or it succeeds.
Errors that concern all items, such as an unreachable database, are raised to the caller of the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from app.kernel import log

_log = log.get(__name__)

#: Most failures that are remembered as logged.
_MAX_REMEMBERED = 1_000


class LoopGuard:
    """Guards the items of one loop, which are identified by kind and id. It is thread-safe."""

    def __init__(self, *passing: type[Exception]) -> None:
        """`passing` are the errors that concern all items: they are not caught."""
        self._passing = passing
        self._logged: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    @contextmanager
    def item(self, kind: str, id_: str) -> Iterator[list[Exception]]:
        """Guard the block for one item. Yields a list, which contains the exception of the block if there was one."""
        failed: list[Exception] = []
        try:
            yield failed
        except self._passing:
            raise
        except Exception as error:  # noqa: BLE001 one item does not stop the others
            failed.append(error)
            if self._is_new(kind, id_, f"{type(error).__name__}: {error}"):
                _log.exception("loop_item_failed", kind=kind, id=id_)
        else:
            with self._lock:
                self._logged.pop((kind, id_), None)

    def _is_new(self, kind: str, id_: str, error: str) -> bool:
        with self._lock:
            known = self._logged.get((kind, id_))
            if known is None and len(self._logged) >= _MAX_REMEMBERED:
                self._logged.clear()
            self._logged[kind, id_] = error
        return known != error
