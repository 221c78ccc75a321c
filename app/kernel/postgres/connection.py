"""
A connection to Postgres: pipelines that send all that they were given, and answers that are waited for so long.

Nothing here knows transactions or pools: `app.kernel.database` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, TypeVar

import psycopg
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait

#: Seconds between two looks for a signal while an answer is waited for; psycopg's own.
_INTERVAL = 0.1
#: Bytes of parameters that prolong the wait for an answer by a second: a server stores long values as fast as this,
#: however busy its machine is.
_BYTES_PER_SECOND = 4 * 1024 * 1024

T = TypeVar("T")


class AnswerTimeout(psycopg.OperationalError):
    """The server holds the connection and says nothing."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"no answer for {seconds:.0f} s")


class Connection(psycopg.Connection[Any]):
    """One that is closed when an answer takes longer than its timeout."""

    #: Seconds for which an answer is waited for; None waits as long as it takes.
    answer_timeout: float | None = None
    #: Bytes of parameters that were sent last.
    _unanswered = 0
    #: While statements are sent, nothing is waited for between them.
    _sending = False

    def wait(self, gen: PQGen[T], interval: float = _INTERVAL, timeout: float | None = None) -> T:
        """As psycopg's. Raises AnswerTimeout when no answer came in time; what the server did by then is unknown."""
        if self._sending:
            return _pushed(gen)
        limit = self.answer_timeout if timeout is None else None
        if limit is None:
            return super().wait(gen, interval, timeout)
        limit += self._unanswered / _BYTES_PER_SECOND
        begun = time.monotonic()
        try:
            return super().wait(gen, interval, limit)
        except psycopg.OperationalError as error:
            if time.monotonic() - begun < limit:
                raise
            self.close()
            raise AnswerTimeout(limit) from error

    def send(self, statements: Iterable[tuple[psycopg.Cursor[Any], str, Any]]) -> None:
        """
        Send statements in the pipeline, each on its cursor with its parameters (or a list of them), to their last byte.

        psycopg 3.3.9 leaves unsent what does not fit into the socket's buffer, and its `Pipeline.sync` then waits for
        the answer to what the server has not seen (app/decisions.md, 30).
        """
        self._unanswered = 0
        self._sending = True
        try:
            for cursor, statement, parameters in statements:
                if self.answer_timeout is not None:
                    self._unanswered += _size(parameters)
                if isinstance(parameters, list):
                    cursor.executemany(statement, parameters)
                else:
                    cursor.execute(statement, parameters)
        finally:
            self._sending = False
        self.wait(generators.send(self.pgconn))


def _pushed(gen: PQGen[T]) -> T:
    """
    What a generator of psycopg gives that only writes: as if the socket could always be written to.

    What the socket does not take stays in libpq's buffer. Asking the system each time would give up the interpreter's
    lock three times for each statement.
    """
    try:
        asked = next(gen)
        while True:
            assert asked & Wait.W, "a statement in a pipeline waits for no answer"
            asked = gen.send(Ready.W)
    except StopIteration as end:
        result: T = end.value
        return result


def _size(value: Any) -> int:
    """Bytes of the long ones among parameters, roughly."""
    match value:
        case str() | bytes():
            return len(value)
        case dict():
            return sum(map(_size, value.values()))
        case list():
            return sum(map(_size, value))
    return 0
