"""Scripted texts: a real model whose first tokens are chosen by a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from workers.engine.engine import LlamaEngine


@contextmanager
def written(engine: LlamaEngine, text: str, *, ends: bool = False) -> Iterator[None]:
    """Inside the block the text of the engine begins with this text, without drafts; with `ends` it ends after it."""
    left = engine.model.tokenize(text, add_special=False, parse_special=True)
    left += [engine.model.eos] if ends else []
    context, real = engine._loop.context, engine._loop.context.logits
    speculator, drafts = engine._loop.speculator, engine._loop.speculator._drafts

    def logits(rows: int) -> Any:
        found = real(rows)
        if left:
            found[:, left.pop(0)] = 1e6
        return found

    speculator._drafts = 0
    context.logits = logits  # type: ignore[method-assign] # one method of the real context is replaced
    try:
        yield
    finally:
        speculator._drafts = drafts
        context.logits = real  # type: ignore[method-assign] # one method of the real context is replaced
