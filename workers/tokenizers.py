"""
Tokenizers of models, for workers that serve none: a child process counts tokens with the vocabulary of a model's file.

One child runs at a time, for the model that was asked for last; it ends by itself when it is not asked for a minute,
and with this process. A child that does not answer is killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.kernel.errors import ModelFileUnusable, Unavailable

_PROGRAM = "workers.engine.bindings.vocabulary"
#: Seconds for an answer: a megabyte takes about one.
_TIMEOUT = 120.0


class Tokenizers:
    """The tokenizers of this process. Many threads may use it."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is that of the child, by default that of this process."""
        self._environment = environment
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._child: subprocess.Popen[str] | None = None

    def count(self, path: Path, texts: Sequence[str]) -> list[int]:
        """
        Return the number of tokens of each text in the vocabulary of a model's file.

        Raises ModelFileUnusable with the reason, and Unavailable when the child does not answer.
        """
        if not texts:
            return []
        with self._lock:
            is_old = self._path == path and self._child is not None
            try:
                return self._asked(path, texts)
            except (OSError, ValueError):
                self._end()
                if not is_old:
                    raise Unavailable(f"the tokenizer of {path.name} does not answer") from None
            try:  # it has ended for want of work meanwhile
                return self._asked(path, texts)
            except (OSError, ValueError):
                self._end()
                raise Unavailable(f"the tokenizer of {path.name} does not answer") from None

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _asked(self, path: Path, texts: Sequence[str]) -> list[int]:
        child = self._started(path)
        answer = self._exchange(child, json.dumps(list(texts)))
        if not isinstance(answer, list) or len(answer) != len(texts):
            raise ValueError("not an answer")
        return answer

    def _started(self, path: Path) -> subprocess.Popen[str]:
        if self._child is not None and self._path == path and self._child.poll() is None:
            return self._child
        self._end()
        arguments = [sys.executable, "-m", _PROGRAM, str(path)]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self._child = subprocess.Popen(
            arguments, stdin=pipe, stdout=pipe, stderr=nothing, text=True, env=self._environment, start_new_session=True
        )
        self._path = path
        first = self._exchange(self._child, None)
        if isinstance(first, dict):
            self._end()
            raise ModelFileUnusable(str(first["error"]))
        return self._child

    def _exchange(self, child: subprocess.Popen[str], line: str | None) -> Any:
        assert child.stdin is not None, "it is a pipe"
        assert child.stdout is not None, "it is a pipe"
        timer = threading.Timer(_TIMEOUT, child.kill)
        timer.start()
        try:
            if line is not None:
                child.stdin.write(line + "\n")
                child.stdin.flush()
            return json.loads(child.stdout.readline())
        finally:
            timer.cancel()

    def _end(self) -> None:
        child, self._child, self._path = self._child, None, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
