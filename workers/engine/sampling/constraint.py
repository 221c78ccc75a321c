"""
Grammar constraints: finding the tokens that a grammar allows without checking the whole vocabulary.

First the grammar checks the tokens close below the best logit. When that is not enough, it checks which single bytes
may come next. An allowed token begins with an allowed byte, so only tokens that begin with one are checked; this is
exact. Of these, the tokens with the highest logits are checked first. When a grammar allows most bytes (for example
inside a string whose length limit excludes the rejected tokens), the best tokens of the whole vocabulary come before.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from workers.engine.bindings.llama import LlamaModel
from workers.engine.sampling.top_tokens import Ids, TopTokens

Row = npt.NDArray[np.float32]

#: Tokens at most this far below the best logit are checked first.
LOGIT_GAP = 4.0
#: Then this many of the best tokens that begin with an allowed byte.
SMALL_SET = 64
#: When more than `LARGE_SET` tokens begin with an allowed byte: first the `VOCABULARY_SET` best tokens of the whole
#: vocabulary, then the `LARGE_SET` best that begin with an allowed byte.
VOCABULARY_SET, LARGE_SET = 256, 2048


class FirstByteIndex:
    """The tokens of a vocabulary, grouped by their first byte. Built at the first use; then any thread may read it."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._groups: dict[int, Ids] = {}
        #: Tokens that no text may contain, even if a grammar allows them.
        self.forbidden: frozenset[int] = frozenset()
        #: The single-byte token of each byte that has one, and all these tokens as an array.
        self.token_of_byte: dict[int, int] = {}
        self.byte_tokens: Ids = np.array([], np.intp)
        self._always: Ids = np.array([], np.intp)

    def prepare(self) -> None:
        """Build the groups, unless they exist."""
        with self._lock:
            if self._groups:
                return
            model = self._model
            groups: dict[int, list[int]] = defaultdict(list)
            token_of_byte: dict[int, int] = {}
            self.forbidden = forbidden = frozenset(model.forbidden_tokens.tolist())
            for token in range(model.n_vocab):
                piece = model.piece(token, special=True)
                if piece and token not in forbidden and token not in model.end_tokens:
                    groups[piece[0]].append(token)
                    if len(piece) == 1:
                        token_of_byte.setdefault(piece[0], token)
            always = [token for byte, tokens in groups.items() if byte not in token_of_byte for token in tokens]
            self._always = np.array([*always, *model.end_tokens], np.intp)
            self.token_of_byte, self.byte_tokens = token_of_byte, np.array(list(token_of_byte.values()), np.intp)
            self._groups = {
                token_of_byte[byte]: np.array(tokens, np.intp)
                for byte, tokens in groups.items()
                if byte in token_of_byte
            }

    def starting_with(self, byte_tokens: Ids, row: Row) -> Iterator[tuple[Ids, float]]:
        """
        Yield growing sets of tokens that begin with a byte of `byte_tokens` or end a text, the best first.

        Each set comes with a logit: all remaining allowed tokens are at or below it. The first set may contain tokens
        that begin with other bytes.
        """
        groups = [self._always, *(self._groups[token] for token in byte_tokens.tolist())]
        some = SMALL_SET
        if sum(map(len, groups)) > LARGE_SET:
            best = TopTokens(row[None], VOCABULARY_SET).of_row(0)
            if len(best):
                yield best, float(row[best].min())
            some = LARGE_SET
        possible = np.concatenate(groups)
        if len(possible) > some:
            logits = row[possible]
            best = np.argpartition(logits, -some)[-some:]
            yield possible[best], float(logits[best[0]])
        yield possible, -math.inf


def near_best(row: Row, best_logit: float) -> tuple[Ids, float]:
    """Return the tokens close below `best_logit`, and the logit that all other tokens are at or below."""
    return (row > best_logit - LOGIT_GAP).nonzero()[0], best_logit - LOGIT_GAP


def is_sufficient(allowed: Row, bound: float, *, top_k: int, min_p: float, mirostat: bool) -> bool:
    """Whether sampling can never choose a token at or below the logit `bound`, given the allowed ones above it."""
    if bound == -math.inf:
        return True
    if not len(allowed):
        return False
    if 0 < top_k <= len(allowed):
        return True
    return min_p > 0 and not mirostat and bound < float(allowed.max()) + math.log(min_p)
