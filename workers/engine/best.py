"""
The best tokens of rows of logits, found without sorting a row: of the maxima of many blocks, the k-th largest is a
bound that k tokens reach, and only the blocks that reach it are looked into.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Logits: one row for each output.
Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

#: A block is this many logits of a row, far from each other: neighbours in the vocabulary tend to be likely together.
_BLOCK = 8
#: Of a row, about so many maxima are sorted.
_MAXIMA = 512


class Best:
    """Of each row of logits, the tokens that reach the bound: its `count` best ones are among them."""

    def __init__(self, logits: Logits, count: int) -> None:
        """Of rows too short for it, all tokens are given; of rows that are no numbers, none."""
        rows, self._width = logits.shape
        self._places = self._found(logits, count) if 2 * _BLOCK * count <= self._width else np.arange(logits.size)
        self._bounds = np.searchsorted(self._places, np.arange(rows + 1) * self._width).tolist()

    def of(self, row: int) -> Ids:
        """Their ids, in order; whatever else there is in the row has a lower logit."""
        ids: Ids = self._places[self._bounds[row] : self._bounds[row + 1]] - row * self._width
        return ids

    def _found(self, logits: Logits, count: int) -> Ids:
        """Their places in all rows, one behind the other."""
        rows = len(logits)
        blocks = self._width // _BLOCK
        inside = _BLOCK * blocks
        highest = logits[:, :inside].reshape(rows, _BLOCK, blocks).max(axis=1)
        depth = max(1, blocks // _MAXIMA)
        maxima = blocks // depth
        few = highest[:, : depth * maxima].reshape(rows, depth, maxima).max(axis=1)
        few.partition(maxima - count, axis=1)
        bound = few[:, maxima - count, None]
        row, block = np.divmod((highest >= bound).reshape(-1).nonzero()[0], blocks)
        places = ((row * self._width + block)[:, None] + np.arange(0, inside, blocks)).reshape(-1)
        found: Ids = places[logits.reshape(-1)[places] >= np.repeat(bound[row, 0], _BLOCK)]
        if inside < self._width:
            row, place = np.nonzero(logits[:, inside:] >= bound)
            found = np.concatenate([found, row * self._width + inside + place])
        found.sort()
        return found
