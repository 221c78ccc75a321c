"""Vectors: what every engine does for a request of them, whoever computes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from app.inference.requests import EmbedRequest
from app.kernel.errors import FailureReason, StepFailure


def prefixed(request: EmbedRequest, query: str, document: str) -> Sequence[str]:
    """The texts as the model was trained to read them: with its prefix for queries, or for documents."""
    prefix = {"query": query, "document": document, None: ""}[request.task]
    return [prefix + text for text in request.texts] if prefix else request.texts


def check(dimensions: int | None, width: int) -> None:
    """Raises StepFailure when the model's vectors have fewer numbers than are wanted, or none are."""
    if dimensions is not None and not 1 <= dimensions <= width:
        message = f"dimensions is {dimensions}; the model gives vectors of {width} numbers"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)


def finished(vectors: Sequence[npt.ArrayLike], dimensions: int | None) -> tuple[tuple[float, ...], ...]:
    """The first `dimensions` numbers of each vector, of length 1. Raises as `check` does."""
    if not vectors:
        return ()
    whole = np.asarray(vectors, np.float32)
    check(dimensions, whole.shape[1])
    kept = whole[:, :dimensions]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    units = np.divide(kept, lengths, out=np.zeros_like(kept), where=lengths > 0)
    return tuple(map(tuple, units.tolist()))
