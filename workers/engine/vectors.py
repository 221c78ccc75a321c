"""Embedding vectors: the steps that all engines share, which are prefixes, dimension checks and normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from app.inference.requests import EmbedRequest
from app.kernel.errors import FailureReason, StepFailure


def with_prefixes(request: EmbedRequest, query: str, document: str) -> Sequence[str]:
    """Return the texts with the model's prefix for queries or for documents, as the request's task says."""
    prefix = {"query": query, "document": document, None: ""}[request.task]
    return [prefix + text for text in request.texts] if prefix else request.texts


def require_dimensions(dimensions: int | None, width: int) -> None:
    """Raises StepFailure unless `dimensions` is None or from 1 to `width`, the model's own dimension."""
    if dimensions is not None and not 1 <= dimensions <= width:
        message = f"dimensions is {dimensions}; it must be from 1 to {width} for this model"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)


def normalised(vectors: Sequence[npt.ArrayLike], dimensions: int | None) -> tuple[tuple[float, ...], ...]:
    """
    Return the first `dimensions` numbers of each vector, normalised to length 1.

    Raises what `require_dimensions` raises.
    """
    if not vectors:
        return ()
    rows = np.asarray(vectors, np.float32)
    require_dimensions(dimensions, rows.shape[1])
    kept = rows[:, :dimensions]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    units = np.divide(kept, lengths, out=np.zeros_like(kept), where=lengths > 0)
    return tuple(map(tuple, units.tolist()))
