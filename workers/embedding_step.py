"""
Embeds: the work of an `embed` step, texts as vectors.

The texts go to the engine some at a time, so that the requests of others come in between. A number keeps six decimals:
more would only lengthen what is stored.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Literal

import numpy as np

from app.inference.requests import EmbedRequest, LongText
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.state_machine.outcomes import Success, TokenUsage
from workers.engine import Engine, OnStop

#: Texts of one step at the most. In JSON, so many vectors of 1,024 numbers take 22 MB.
MOST = 2_048
#: Texts that the engine gets at a time.
_GROUP = 128
#: Of each number of a vector. The length of a vector is 1, so this is nearer than half-precision weights are.
_DECIMALS = 6


def embed(
    texts: Any,
    engine: Engine,
    *,
    on_stop: OnStop,
    timeout: timedelta,
    task: Literal["query", "document"] = "document",
    dimensions: int | None = None,
    long: Literal["chunk", "truncate", "refuse"] = "chunk",
) -> Success:
    """
    The vector of a text, or the vectors of a list of texts in their order, each a list of numbers.

    Raises StepFailure, and CancelledError when it was stopped.
    """
    listed = [texts] if isinstance(texts, str) else texts
    _check(listed)
    until = time.monotonic() + timeout.total_seconds()
    vectors: list[list[float]] = []
    tokens = 0
    for start in range(0, len(listed), _GROUP):
        request = EmbedRequest(tuple(listed[start : start + _GROUP]), LongText(long), task, dimensions)
        try:
            found = engine.embed(request, max(0.0, until - time.monotonic()), on_stop)
        except TimeoutError:
            done = f"{start} of {len(listed)} texts were embedded" if start else "no text was embedded"
            raise StepFailure(FailureReason.TIMEOUT, f"{done} after {timeout.total_seconds():g} s") from None
        except StepFailure as failure:
            if not start:
                raise
            raise StepFailure(failure.reason, f"after the first {start} texts: {failure.message}") from None
        vectors += np.asarray(found.vectors, np.float64).round(_DECIMALS).tolist()
        tokens += found.tokens_in
    return Success(vectors[0] if isinstance(texts, str) else vectors, TokenUsage(tokens_in=tokens))


def _check(texts: Any) -> None:
    """Raises StepFailure unless there is a list of texts, none of them empty."""
    if not isinstance(texts, list):
        raise _refused(f"'texts' gives {_kind(texts)}; a text or a list of texts is needed")
    if len(texts) > MOST:
        raise _refused(
            f"'texts' gives {len(texts)} texts; a step embeds {MOST} at the most: map over parts of the list"
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise _refused(f"'texts' gives {_kind(text)} at the place {index}; a text is needed")
        if not text:
            raise _refused(f"the text at the place {index} is empty")


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        dict: "an object",
    }
    return names.get(type(value), "a list")


def _refused(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)
