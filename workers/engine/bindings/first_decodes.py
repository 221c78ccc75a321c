"""The first decodes of a context: they read the weights, and choose the number of CPU threads."""

from __future__ import annotations

from time import perf_counter

from workers.engine.bindings.llama import Context, decode_threads
from workers.engine.threads import kind_of

#: The most seconds for choosing threads before the first request; the choice goes on while serving.
MOST_SECONDS = 0.3


def choose_threads(context: Context, texts: int, most_seconds: float = MOST_SECONDS) -> None:
    """
    Decode a token of each of so many texts, again and again, until the number of threads for it is chosen.

    Ends when the next decode would probably pass `most_seconds`. The context is empty then. The first decode, which
    reads the weights, does not count.

    Belongs on the thread that decodes later: each thread that decodes has workers of its own, and with more workers
    than cores libgomp lets all of them spin for a shorter time, which costs a fifth of the speed of one text.
    """
    kind = kind_of(texts, 1)
    context.threads.try_now(kind)
    if not context.writes_text or context.threads.is_settled(kind):
        return
    began, at = perf_counter(), 0
    code = context.decode([(sequence, at, [0], 1) for sequence in range(texts)])
    context.threads = decode_threads(context.options)
    context.threads.try_now(kind)
    longest, end = perf_counter() - began, perf_counter() + most_seconds
    while code == 0 and not context.threads.is_settled(kind) and at + 1 < context.n_sequence // texts:
        began, at = perf_counter(), at + 1
        if began + longest > end:
            break
        code = context.decode([(sequence, at, [0], 1) for sequence in range(texts)])
        longest = perf_counter() - began if at == 1 else max(longest, perf_counter() - began)
    context.clear()
