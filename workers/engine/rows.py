"""
Rows: a token for each output of a decode, found for many texts at once where that is faster.

The most likely tokens of all rows take one call of numpy. Texts that need only the best few get those that lie close
below each row's best, found by one comparison over all rows, instead of a walk through the vocabulary each.
How close is learnt: so that most rows hold enough, and few hold many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from app.kernel.errors import StepFailure
from workers.engine.llama import Logits, Model
from workers.engine.sampling import Candidates, Chooser, logprob
from workers.engine.tasks import Task

#: Logits below the best, at first and at the ends.
_GAP, _LEAST_GAP, _MOST_GAP = 10.0, 1.0, 20.0
#: More tokens than this close to a row's best cost more than they save.
_MANY = 768
_NONE = np.array([], np.intp)


class Close:
    """The tokens of each row that lie close below its best."""

    def __init__(self, logits: Logits, gap: float) -> None:
        least = logits.max(axis=1) - np.float32(gap)
        self._width = logits.shape[1]
        self.found = _where(np.greater(logits, least[:, None]).reshape(-1))
        self._bounds = np.searchsorted(self.found, np.arange(len(logits) + 1) * self._width)

    def of(self, row: int) -> npt.NDArray[np.intp]:
        """Their ids in the row; whatever else there is has a lower logit."""
        ids: npt.NDArray[np.intp] = self.found[self._bounds[row] : self._bounds[row + 1]] - row * self._width
        return ids


def _where(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """The places of the few that are true: eight are looked at together."""
    if len(mask) % 8:
        return np.flatnonzero(mask)
    eights = np.flatnonzero(mask.view(np.uint64))
    inside = np.flatnonzero(mask.reshape(-1, 8)[eights])
    found: npt.NDArray[np.intp] = eights[inside >> 3] * 8 + (inside & 7)
    return found


class Rows:
    """Chooses tokens for the texts of one context."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._candidates = Candidates(model.n_vocab)
        self._gap = _GAP

    def choose(
        self, tasks: Sequence[Task], logits: Logits, context: Any, outputs: Sequence[int]
    ) -> Iterator[tuple[Task, int | StepFailure]]:
        """The next token of each task, or why there is none. `outputs` are the rows' places in the batch."""
        choosers = [task.chooser for task in tasks if task.chooser is not None]
        plain = [chooser.plain for chooser in choosers]
        best = logits.argmax(axis=1).tolist() if any(plain) else []
        before = {row: logits[row].copy() for row, task in enumerate(tasks) if task.request.logprobs is not None}
        for chooser, row in zip(choosers, logits, strict=True) if not all(plain) else ():
            chooser.adjust(row)
        close = self._close(choosers, logits)
        for row, (task, chooser) in enumerate(zip(tasks, choosers, strict=True)):
            if plain[row]:
                token = best[row]
            else:
                ids = close.of(row) if close is not None and chooser.narrow else _NONE
                try:
                    if len(ids) >= chooser.narrow > 0:
                        token = chooser.choose_among(logits[row], ids, self._candidates)
                    else:
                        token = chooser.choose(logits[row], context, outputs[row], self._candidates)
                except StepFailure as failure:
                    yield task, failure
                    continue
            if row in before:
                task.logprobs.append(logprob(self._model, task.request.logprobs or 0, before[row], token))
            yield task, token

    def _close(self, choosers: Sequence[Chooser], logits: Logits) -> Close | None:
        wanting = [row for row, chooser in enumerate(choosers) if chooser.narrow]
        if len(wanting) < 2:
            return None
        close = Close(logits, self._gap)
        if len(close.found) > _MANY * len(logits):
            self._gap = max(_LEAST_GAP, self._gap * 0.8)
        elif sum(len(close.of(row)) < choosers[row].narrow for row in wanting) > len(wanting) // 4:
            self._gap = min(_MOST_GAP, self._gap * 1.1)
        return close
