"""The first decodes of a context: they read the weights, and choose the number of CPU threads."""

from __future__ import annotations

import math
from time import perf_counter

from workers.engine.bindings.llama import Context
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
    if not context.writes_text:
        return
    kind, longest, end = kind_of(texts, 1), 0.0, math.inf
    context.threads.try_now(kind)
    for at in range(context.n_sequence // texts):
        began = perf_counter()
        if context.threads.is_settled(kind) or began + longest > end:
            break
        if context.decode([(sequence, at, [0], 1) for sequence in range(texts)]):
            break
        taken = perf_counter() - began
        longest = taken if at < 2 else max(longest, taken)
        if not at:
            end = perf_counter() + most_seconds
    context.clear()
