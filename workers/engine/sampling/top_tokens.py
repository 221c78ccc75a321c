"""
Top-k tokens of rows of logits, found without sorting a row.

Each row is divided into blocks. The k-th largest of the block maxima is a bound that at least k tokens reach, so only
blocks whose maximum reaches the bound are searched.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Logits, one row for each output.
Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

#: Logits in a block. They are far apart in the row, because neighbours in the vocabulary tend to be likely together.
_BLOCK = 8
#: Approximate number of maxima per row in the partial sort.
_MAX_SORTED = 512


class TopTokens:
    """The tokens of each row of logits that reach the row's bound. The `count` best tokens are among them."""

    def __init__(self, logits: Logits, count: int) -> None:
        """For rows too short for blocks all tokens are returned, for rows of NaN none."""
        rows, self._width = logits.shape
        self._indices = self._found(logits, count) if 2 * _BLOCK * count <= self._width else np.arange(logits.size)
        self._bounds = np.searchsorted(self._indices, np.arange(rows + 1) * self._width).tolist()

    def of_row(self, row: int) -> Ids:
        """Return the token ids of a row, ascending. All other tokens of the row have a lower logit."""
        ids: Ids = self._indices[self._bounds[row] : self._bounds[row + 1]] - row * self._width
        return ids

    def _found(self, logits: Logits, count: int) -> Ids:
        """Return the indices of the found tokens in the flattened logits, ascending."""
        rows = len(logits)
        blocks = self._width // _BLOCK
        inside = _BLOCK * blocks
        highest = logits[:, :inside].reshape(rows, _BLOCK, blocks).max(axis=1)
        depth = max(1, blocks // _MAX_SORTED)
        maxima = blocks // depth
        few = highest[:, : depth * maxima].reshape(rows, depth, maxima).max(axis=1)
        few.partition(maxima - count, axis=1)
        bound = few[:, maxima - count, None]
        row, block = np.divmod((highest >= bound).reshape(-1).nonzero()[0], blocks)
        indices = ((row * self._width + block)[:, None] + np.arange(0, inside, blocks)).reshape(-1)
        found: Ids = indices[logits.reshape(-1)[indices] >= np.repeat(bound[row, 0], _BLOCK)]
        if inside < self._width:
            row, index = np.nonzero(logits[:, inside:] >= bound)
            found = np.concatenate([found, row * self._width + inside + index])
        found.sort()
        return found
