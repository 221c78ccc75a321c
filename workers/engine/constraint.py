"""
Constraints: which tokens a grammar lets stand, found without walking the vocabulary.

First the tokens close below the best logit are masked. When that is not enough, the grammar is asked which single bytes
may come next: an allowed token begins with an allowed byte, so only tokens that begin with one are masked. That is
exact. Of these too, those with the highest logits come first, and where a grammar allows most bytes (inside a text that
may not be long enough for the tokens that were refused), the best of all.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from workers.engine.best import Best, Ids
from workers.engine.llama import LlamaModel

Row = npt.NDArray[np.float32]

#: Tokens this close below the best logit are tried first.
GAP = 4.0
#: Then, of those that begin as they may, so many of the best.
SOME = 64
#: Where more than `MANY` begin as they may, first `MORE` of the best of the whole vocabulary, then `MANY` of the best.
MORE, MANY = 256, 2048


class Alphabet:
    """The tokens of a vocabulary by their first byte. Made at the first use; then any thread may read it."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._groups: dict[int, Ids] = {}
        #: Tokens that no text may hold, whatever a grammar lets pass.
        self.barred: frozenset[int] = frozenset()
        #: The token of each byte that has one of its own, and all of these tokens.
        self.singles: dict[int, int] = {}
        self.probes: Ids = np.array([], np.intp)
        self._always: Ids = np.array([], np.intp)

    def prepare(self) -> None:
        """Make the groups, if they are not there."""
        with self._lock:
            if self._groups:
                return
            model = self._model
            groups: dict[int, list[int]] = defaultdict(list)
            single: dict[int, int] = {}
            self.barred = barred = frozenset(model.controls_array.tolist())
            for token in range(model.n_vocab):
                piece = model.piece(token, special=True)
                if piece and token not in barred and token not in model.ends:
                    groups[piece[0]].append(token)
                    if len(piece) == 1:
                        single.setdefault(piece[0], token)
            always = [token for byte, tokens in groups.items() if byte not in single for token in tokens]
            self._always = np.array([*always, *model.ends], np.intp)
            self.singles, self.probes = single, np.array(list(single.values()), np.intp)
            self._groups = {
                single[byte]: np.array(tokens, np.intp) for byte, tokens in groups.items() if byte in single
            }

    def beginning(self, probes: Ids, row: Row) -> Iterator[tuple[Ids, float]]:
        """
        Tokens that begin with one of the bytes of `probes`, and those that end a text: the best of them first, each
        time with the logit that the others are at or below. The first time others may be among them.
        """
        groups = [self._always, *(self._groups[probe] for probe in probes.tolist())]
        some = SOME
        if sum(map(len, groups)) > MANY:
            best = Best(row[None], MORE).of(0)
            if len(best):
                yield best, float(row[best].min())
            some = MANY
        possible = np.concatenate(groups)
        if len(possible) > some:
            logits = row[possible]
            best = np.argpartition(logits, -some)[-some:]
            yield possible[best], float(logits[best[0]])
        yield possible, -math.inf


def close(row: Row, most: float) -> tuple[Ids, float]:
    """The tokens close below the best, whose logit is `most`, and the logit that all others are at or below."""
    return (row > most - GAP).nonzero()[0], most - GAP


def enough(allowed: Row, least: float, *, top_k: int, min_p: float, mirostat: bool) -> bool:
    """Whether tokens at or below the logit `least` could not be chosen anyway, given those allowed above it."""
    if least == -math.inf:
        return True
    if not len(allowed):
        return False
    if 0 < top_k <= len(allowed):
        return True
    return min_p > 0 and not mirostat and least < float(allowed.max()) + math.log(min_p)
