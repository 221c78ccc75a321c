"""
The llama.cpp library of this process: bound functions, its log, its initialisation.

Short calls hold the GIL (ctypes.PyDLL). Through ctypes.CDLL each call would release it and wait for it again, which
costs milliseconds when another Python thread is busy. Calls that compute release it.
llama.cpp reports reasons only in its log. The last lines are kept here, so that errors can contain them.
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

#: Log lines that are kept.
_KEPT_LINES = 400
#: ggml's levels.
WARN, _ERROR, _CONTINUE = 3, 4, 5
#: Variables that name the GPUs that ggml's backends see; an empty one hides them all.
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
#: ggml's kinds of devices.
_CPU_DEVICE, _GPU_DEVICE, _INTEGRATED_GPU, _ACCELERATOR = 0, 1, 2, 3

#: The shared library, which exports llama.cpp and ggml.
library = _library = api.llama_cpp._lib
_gil_holding_library = ctypes.PyDLL(_library._name)


def _gil_holding(name: str) -> Callable[..., Any]:
    """Bind the function so that calls hold the GIL."""
    bound, short = getattr(_library, name), getattr(_gil_holding_library, name)
    short.argtypes, short.restype = bound.argtypes, bound.restype
    return short  # type: ignore[no-any-return] # functions of a library have no types


apply = _gil_holding("llama_sampler_apply")
accept = _gil_holding("llama_sampler_accept")
clone = _gil_holding("llama_sampler_clone")
free_sampler = _gil_holding("llama_sampler_free")
seq_rm = _gil_holding("llama_memory_seq_rm")
seq_cp = _gil_holding("llama_memory_seq_cp")
pos_min = _gil_holding("llama_memory_seq_pos_min")
pos_max = _gil_holding("llama_memory_seq_pos_max")
token_to_piece = _gil_holding("llama_token_to_piece")

# These compute or wait for a device, so they release the GIL.
decode = _library.llama_decode
logits = _library.llama_get_logits
tokenize = _library.llama_tokenize
state_size = _library.llama_state_seq_get_size
state_get = _library.llama_state_seq_get_data
state_set = _library.llama_state_seq_set_data

#: A token, its logit and its probability, in llama.cpp's layout.
TOKEN_DATA = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])


class _Log:
    """The last log lines, in order. Only complete lines are kept."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, int, str]] = deque(maxlen=_KEPT_LINES)
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
            problems = [
                (level, line) for number, level, line in self._lines if number > mark and level >= WARN and line
            ]
        return [line for _, line in sorted(problems, key=lambda entry: -entry[0])]


_log = _Log()
_start_lock = threading.Lock()
_is_started = False


def start() -> None:
    """Initialise llama.cpp in this process, once. A failing assertion of it starts no debugger for a backtrace."""
    global _is_started
    with _start_lock:
        if _is_started:
            return
        os.putenv("GGML_NO_BACKTRACE", "1")
        install_log_callback()
        api.llama_backend_init()
        _is_started = True


def hide_gpus() -> None:
    """Hide all GPUs from this process, before `start`: llama.cpp uses each that it sees, even with no layer on it."""
    for name in _VISIBLE_DEVICES:
        os.putenv(name, "")


def bound(name: str, result: Any, *arguments: Any) -> Any:
    """Bind a function of the library that llama-cpp-python does not declare; by default it takes one pointer."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments or (ctypes.c_void_p,))
    return function


def gpus() -> list[int]:
    """Return the GPUs that llama.cpp computes on, in its order. It uses integrated ones only if there are no others."""
    return _devices(_GPU_DEVICE) or _devices(_INTEGRATED_GPU)


def accelerators() -> int:
    """Return how many devices compute beside the CPU, in its memory."""
    return len(_devices(_ACCELERATOR))


def _devices(kind: int) -> list[int]:
    count, get = bound("ggml_backend_dev_count", ctypes.c_size_t), bound("ggml_backend_dev_get", ctypes.c_void_p)
    count.argtypes, get.argtypes = [], [ctypes.c_size_t]
    kind_of = bound("ggml_backend_dev_type", ctypes.c_int)
    return [device for device in map(get, range(count())) if kind_of(device) == kind]


def is_in_host_memory(device: int) -> bool:
    """Whether the buffers of a ggml device are host memory."""
    return bound("ggml_backend_dev_type", ctypes.c_int)(device) in {_CPU_DEVICE, _ACCELERATOR}


def free_on(name: str) -> int | None:
    """Return the free bytes of the GPU with this name in ggml, such as `Vulkan0`; None when there is no such GPU."""
    found = bound("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)(name.encode())
    if not found or found not in gpus():
        return None
    sizes = ctypes.POINTER(ctypes.c_size_t)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    bound("ggml_backend_dev_memory", None, ctypes.c_void_p, sizes, sizes)(found, free, total)
    return free.value


def log_callback() -> Any:
    """Return the function that collects llama.cpp's log, for its other libraries."""
    return _log.callback


def install_log_callback() -> None:
    """Send llama.cpp's log to the lines that are kept here."""
    api.llama_log_set(_log.callback, ctypes.c_void_p(0))


@contextmanager
def captured_log() -> Iterator[Callable[[], list[str]]]:
    """Yield a function that returns llama.cpp's errors and warnings since the block began, errors first."""
    mark = _log.mark()
    yield lambda: _log.since(mark)
