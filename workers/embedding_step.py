"""
The execution of `embed` steps: texts become vectors.

The texts are sent to the engine in batches, so that other requests are served in between. Numbers are rounded to six
decimals: more would only make the stored output longer.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Literal

import numpy as np

from app.inference.requests import EmbedRequest, LongText, PriorityClass
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.state_machine.outcomes import Success, TokenUsage
from workers.engine import Engine, OnStop

#: Most texts of one step. As JSON, so many vectors of 1,024 numbers have 22 MB.
MAX_TEXTS = 2_048
#: Texts in a request to the engine.
_BATCH = 128
#: Decimals of the numbers. Vectors have the length 1, so the error is smaller than that of half-precision weights.
_DECIMALS = 6


def embed(
    texts: Any,
    engine: Engine,
    *,
    on_stop: OnStop,
    timeout: timedelta,
    task: Literal["query", "document"] | None = "document",
    dimensions: int | None = None,
    long: Literal["chunk", "truncate", "refuse"] = "chunk",
    priority: PriorityClass = PriorityClass.STANDARD,
) -> Success:
    """
    Return the vector of a text, or the vectors of a list of texts in their order. A vector is a list of numbers.

    Raises StepFailure, and CancelledError when the step was cancelled.
    """
    all_texts = [texts] if isinstance(texts, str) else texts
    _check(all_texts)
    until = time.monotonic() + timeout.total_seconds()
    vectors: list[list[float]] = []
    tokens = 0
    for start in range(0, len(all_texts), _BATCH):
        request = EmbedRequest(tuple(all_texts[start : start + _BATCH]), LongText(long), task, dimensions, priority)
        try:
            found = engine.embed(request, max(0.0, until - time.monotonic()), on_stop)
        except TimeoutError:
            done = f"{start} of {len(all_texts)} texts were embedded" if start else "no text was embedded"
            raise StepFailure(FailureReason.TIMEOUT, f"{done} after {timeout.total_seconds():g} s") from None
        except StepFailure as failure:
            if not start:
                raise
            raise StepFailure(failure.reason, f"after the first {start} texts: {failure.message}") from None
        vectors += np.asarray(found.vectors, np.float64).round(_DECIMALS).tolist()
        tokens += found.tokens_in
    return Success(vectors[0] if isinstance(texts, str) else vectors, TokenUsage(tokens_in=tokens))


def _check(texts: Any) -> None:
    """Raises StepFailure unless `texts` is a list of non-empty texts of an accepted length."""
    if not isinstance(texts, list):
        raise _invalid(f"'texts' is {_kind(texts)}; a text or a list of texts is required")
    if len(texts) > MAX_TEXTS:
        raise _invalid(
            f"'texts' has {len(texts)} texts; a step accepts at most {MAX_TEXTS}: map over parts of the list"
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise _invalid(f"'texts' has {_kind(text)} at index {index}; a text is required")
        if not text:
            raise _invalid(f"the text at index {index} is empty; a non-empty text is required")


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


def _invalid(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)
