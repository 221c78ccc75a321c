"""
llama.cpp, as this process uses it: bound calls, its log lines, its start.

Short calls keep the interpreter's lock (PyDLL): through ctypes.CDLL each of them gives the lock away and waits for
it again, which costs milliseconds as soon as another Python thread is busy. Calls that compute let it go.
llama.cpp writes its reasons to its log only; the last lines are kept here, so that errors can say why.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp as api
import numpy as np

#: Lines of llama.cpp that are kept.
_LINES = 400
#: ggml's levels.
_WARN, _ERROR, _CONTINUE = 3, 4, 5

_library = api.llama_cpp._lib
_short_library = ctypes.PyDLL(_library._name)


def _short(name: str) -> Callable[..., Any]:
    """The function, called without letting go of the interpreter's lock."""
    bound, short = getattr(_library, name), getattr(_short_library, name)
    short.argtypes, short.restype = bound.argtypes, bound.restype
    return short  # type: ignore[no-any-return]


apply = _short("llama_sampler_apply")
accept = _short("llama_sampler_accept")
clone = _short("llama_sampler_clone")
free_sampler = _short("llama_sampler_free")
seq_rm = _short("llama_memory_seq_rm")
seq_cp = _short("llama_memory_seq_cp")
pos_min = _short("llama_memory_seq_pos_min")
pos_max = _short("llama_memory_seq_pos_max")
token_to_piece = _short("llama_token_to_piece")

# These compute, or wait for a device.
decode = _library.llama_decode
logits = _library.llama_get_logits
tokenize = _library.llama_tokenize
state_size = _library.llama_state_seq_get_size
state_get = _library.llama_state_seq_get_data
state_set = _library.llama_state_seq_set_data

#: A token, its logit and its probability, as llama.cpp lays them out.
TOKEN_DATA = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])


class _Log:
    """The last lines, in order; whole lines only."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, int, str]] = deque(maxlen=_LINES)
        self._lock = threading.Lock()
        self._count = 0
        self._open = ""
        self._level = 0
        self.callback = api.llama_log_callback(self._take)

    def _take(self, level: int, text: bytes, _: object) -> None:
        piece = text.decode("utf-8", "replace")
        with self._lock:
            self._level = self._level if level == _CONTINUE else level
            self._open += piece
            if not self._open.endswith("\n"):
                return
            line, self._open = self._open.strip(), ""
            self._count += 1
            self._lines.append((self._count, self._level, line))

    def mark(self) -> int:
        with self._lock:
            return self._count

    def since(self, mark: int) -> list[str]:
        with self._lock:
            told = [(level, line) for number, level, line in self._lines if number > mark and level >= _WARN and line]
        return [line for _, line in sorted(told, key=lambda entry: -entry[0])]


_log = _Log()
_started = threading.Lock()
_is_started = False


def start() -> None:
    """Start llama.cpp in this process, once. No gdb is called when an assertion of it fails."""
    global _is_started
    with _started:
        if _is_started:
            return
        os.putenv("GGML_NO_BACKTRACE", "1")
        api.llama_log_set(_log.callback, ctypes.c_void_p(0))
        api.llama_backend_init()
        _is_started = True


@contextmanager
def lines() -> Iterator[Callable[[], list[str]]]:
    """Inside, llama.cpp's errors and warnings are gathered; the function gives those so far, errors first."""
    mark = _log.mark()
    yield lambda: _log.since(mark)
