"""
A connection to Postgres with an answer timeout, and with pipelines that send every statement completely.

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

#: Seconds between two checks for signals while waiting for an answer; psycopg's own value.
_INTERVAL = 0.1
#: The answer timeout grows by one second per so many bytes of parameters: even a server on a busy machine stores long
#: values at this rate.
_BYTES_PER_SECOND = 4 * 1024 * 1024

T = TypeVar("T")


class AnswerTimeout(psycopg.OperationalError):
    """The server keeps the connection open and does not answer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"no answer for {seconds:.0f} s")


class Connection(psycopg.Connection[Any]):
    """A connection that is closed when an answer takes longer than its timeout."""

    #: Most seconds to wait for an answer; None waits without a limit.
    answer_timeout: float | None = None
    #: Bytes of the parameters in the last `send`.
    _sent_bytes = 0
    #: While statements are being sent, `wait` does not wait for the socket.
    _sending = False

    def wait(self, gen: PQGen[T], interval: float = _INTERVAL, timeout: float | None = None) -> T:
        """As in psycopg. Raises AnswerTimeout when no answer came in time; what the server has done is then unknown."""
        if self._sending:
            return _buffered(gen)
        limit = self.answer_timeout if timeout is None else None
        if limit is None:
            return super().wait(gen, interval, timeout)
        limit += self._sent_bytes / _BYTES_PER_SECOND
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
        Send statements in the pipeline completely, each on its cursor with its parameters (or a list of parameters).

        psycopg 3.3.9 leaves unsent what does not fit into the socket's buffer. Its `Pipeline.sync` then waits for the
        answer to a statement that the server has not received (app/decisions.md, 30).
        """
        self._sent_bytes = 0
        self._sending = True
        try:
            for cursor, statement, parameters in statements:
                if self.answer_timeout is not None:
                    self._sent_bytes += _size(parameters)
                if isinstance(parameters, list):
                    cursor.executemany(statement, parameters)
                else:
                    cursor.execute(statement, parameters)
        finally:
            self._sending = False
        self.wait(generators.send(self.pgconn))


def _buffered(gen: PQGen[T]) -> T:
    """
    Run a generator of psycopg that only writes, as if the socket was always writable, and return its result.

    libpq buffers what the socket does not accept. Checking the socket each time would release the interpreter's lock
    three times per statement.
    """
    try:
        needed = next(gen)
        while True:
            assert needed & Wait.W, "a statement in a pipeline waits for no answer"
            needed = gen.send(Ready.W)
    except StopIteration as end:
        result: T = end.value
        return result


def _size(value: Any) -> int:
    """Return the approximate number of bytes of the parameters; short values such as numbers are not counted."""
    match value:
        case str() | bytes():
            return len(value)
        case dict():
            return sum(map(_size, value.values()))
        case list():
            return sum(map(_size, value))
    return 0
