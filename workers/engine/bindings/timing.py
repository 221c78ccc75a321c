"""Decodes with the chosen number of CPU threads, which is chosen by how long they take."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import llama_cpp as api

from workers.engine.threads import DecodeKind, DecodeThreads


class ComputingContext(Protocol):
    """A llama.cpp context, and how many CPU threads compute its decodes."""

    pointer: Any
    threads: DecodeThreads


def timed_decode(context: ComputingContext, kind: DecodeKind, tokens: int, decode: Callable[[], int]) -> int:
    """Decode with the chosen number of threads, and record the time. Returns llama.cpp's code."""
    count = context.threads.count(kind, tokens)
    api.llama_set_n_threads(context.pointer, count, count)
    began = perf_counter()
    code = int(decode())
    if code == 0:
        context.threads.record(kind, tokens, count, perf_counter() - began)
    return code
