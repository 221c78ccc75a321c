"""
Rows: a token for each output of a decode, found for many texts at once where that is faster.

The most likely tokens of all rows take one call of numpy. Texts that need only the best few get those, found for all
rows together without sorting any: of the maxima of many blocks, the k-th largest is a bound that k tokens reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from app.kernel.errors import StepFailure
from workers.engine.llama import Logits, Model
from workers.engine.sampling import Candidates, Chooser, Ids, logprob
from workers.engine.tasks import Task

#: A block is this many logits of a row, far from each other: neighbours in the vocabulary tend to be likely together.
_BLOCK = 8
#: Of a row, about so many maxima are sorted.
_MAXIMA = 512


class Best:
    """Of each row of logits, the tokens that reach the bound: its `count` best ones are among them."""

    def __init__(self, logits: Logits, count: int) -> None:
        """A row has at least `least_width(count)` logits."""
        rows, self._width = logits.shape
        blocks = self._width // _BLOCK
        inside = _BLOCK * blocks
        highest = logits[:, :inside].reshape(rows, _BLOCK, blocks).max(axis=1)
        depth = max(1, blocks // _MAXIMA)
        maxima = blocks // depth
        few = highest[:, : depth * maxima].reshape(rows, depth, maxima).max(axis=1)
        few.partition(maxima - count, axis=1)
        bound = few[:, maxima - count, None]
        row, block = np.divmod(np.flatnonzero(highest >= bound), blocks)
        places = ((row * self._width + block)[:, None] + np.arange(0, inside, blocks)).reshape(-1)
        self._places = places[logits.reshape(-1)[places] >= np.repeat(bound[row, 0], _BLOCK)]
        if inside < self._width:
            row, place = np.nonzero(logits[:, inside:] >= bound)
            self._places = np.concatenate([self._places, row * self._width + inside + place])
        self._places.sort()
        self._bounds = np.searchsorted(self._places, np.arange(rows + 1) * self._width).tolist()

    def of(self, row: int) -> Ids:
        """Their ids, in order; whatever else there is in the row has a lower logit."""
        ids: Ids = self._places[self._bounds[row] : self._bounds[row + 1]] - row * self._width
        return ids


def least_width(count: int) -> int:
    """The vocabulary from which on finding the `count` best tokens beforehand is possible."""
    return 2 * _BLOCK * count


class Rows:
    """Chooses tokens for the texts of one context."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._candidates = Candidates(model.n_vocab)

    def choose(self, tasks: Sequence[Task], logits: Logits) -> Iterator[tuple[Task, int | StepFailure]]:
        """The next token of each task, or why there is none."""
        choosers = [task.chooser for task in tasks if task.chooser is not None]
        plain = [chooser.plain for chooser in choosers]
        before = {row: logits[row].copy() for row, task in enumerate(tasks) if task.request.logprobs is not None}
        for chooser, row in zip(choosers, logits, strict=True) if not all(plain) else ():
            chooser.adjust(row)
        best: list[int] = logits.argmax(axis=1).tolist() if any(chooser.greedy for chooser in choosers) else []
        near = self._near(choosers, logits)
        for row, (task, chooser) in enumerate(zip(tasks, choosers, strict=True)):
            if plain[row]:
                token = best[row]
            else:
                try:
                    first = best[row] if chooser.greedy else None
                    token = chooser.choose(logits[row], self._candidates, first, near.get(row))
                except StepFailure as failure:
                    yield task, failure
                    continue
            if row in before:
                task.logprobs.append(logprob(self._model, task.request.logprobs or 0, before[row], token))
            yield task, token

    def _near(self, choosers: Sequence[Chooser], logits: Logits) -> dict[int, Ids]:
        """The best tokens of the rows that need no more, by row."""
        wanting = [row for row, chooser in enumerate(choosers) if 0 < least_width(chooser.narrow) <= logits.shape[1]]
        if not wanting:
            return {}
        best = Best(
            logits if len(wanting) == len(logits) else logits[wanting], max(choosers[row].narrow for row in wanting)
        )
        found = {row: best.of(at) for at, row in enumerate(wanting)}
        # fewer there are only where logits are no numbers
        return {row: ids for row, ids in found.items() if len(ids) >= choosers[row].narrow}
