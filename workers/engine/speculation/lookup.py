"""
Prompt lookup: predicts the next tokens of a text from the last place where the same tokens stood.

A text that copies its prompt (an extraction, an edit), or repeats itself (JSON, code), is predicted well.
Each token that is added shows whether the prediction was right, so a prediction is judged without being computed.
Adding a token takes constant time. The index holds two entries for each token, of the last `MAX_INDEXED` of the prompt
and of all that are written.

It knows tokens as numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

#: Tokens of the prompt that are indexed, its last ones: about 200 bytes each.
MAX_INDEXED = 32_768
#: Longer matches are counted as so long.
MAX_MATCH = 64
#: Bits of a token in a key.
_BITS = 21

#: Receives the length of the match behind a prediction, and whether the next token was the predicted one.
OnOutcome = Callable[[int, bool], None]


class PromptLookup:
    """The lookup of one text."""

    __slots__ = ("_at", "_length", "_pairs", "_seen", "_tokens", "_triples")

    def __init__(self, tokens: Sequence[int], prompt: int) -> None:
        """`tokens` is the text's own list, to which its new tokens are added; its first `prompt` ones are indexed."""
        self._tokens = tokens
        ids = np.array(tokens[max(0, prompt - MAX_INDEXED) : prompt], np.int64)
        first = prompt - len(ids)
        pairs = (ids[:-1] << _BITS) | ids[1:]
        triples = (pairs[:-1] << _BITS) | ids[2:]
        # The places after each pair and each triple. The last ones of the prompt are looked up before they are added.
        self._pairs = dict(zip(pairs[:-1].tolist(), range(first + 2, prompt), strict=True))
        self._triples = dict(zip(triples[:-1].tolist(), range(first + 3, prompt), strict=True))
        #: The place of the predicted next token, or -1, and how many tokens before it equal the last ones of the text.
        self._at, self._length = -1, 0
        self._seen = prompt
        if prompt > 1:
            self._find()

    @property
    def length(self) -> int:
        """How many tokens before the predicted one equal the last ones of the text; 0 without a prediction."""
        return self._length

    def follow(self, on_outcome: OnOutcome) -> None:
        """Add the tokens that were written since the last call."""
        tokens = self._tokens
        while self._seen < len(tokens):
            is_hit = self._at >= 0 and tokens[self._at] == tokens[self._seen]
            if self._at >= 0:
                on_outcome(self._length, is_hit)
            self._seen += 1
            if is_hit:
                self._at, self._length = self._at + 1, min(self._length + 1, MAX_MATCH)
                self._add()
            else:
                self._find()

    def predict(self, most: int) -> list[int]:
        """Return at most `most` tokens that the text may continue with. A repetition is predicted to go on."""
        if self._at < 0:
            return []
        found = list(self._tokens[self._at : min(self._seen, self._at + most)])
        repeated = -(-most // len(found))
        return (found * repeated)[:most]

    def _key(self) -> int:
        """The key of the last two tokens."""
        return (self._tokens[self._seen - 2] << _BITS) | self._tokens[self._seen - 1]

    def _add(self) -> None:
        """Index the last two and three tokens."""
        seen = self._seen
        if seen < 2:
            return
        self._pairs[self._key()] = seen
        if seen > 2:
            self._triples[(self._tokens[seen - 3] << 2 * _BITS) | self._key()] = seen

    def _find(self) -> None:
        """Find the last place where the last three tokens stood, or else the last two; then index them."""
        tokens, seen = self._tokens, self._seen
        at = -1
        if seen > 2:
            at = self._triples.get((tokens[seen - 3] << 2 * _BITS) | self._key(), -1)
        if at < 0 and seen > 1:
            at = self._pairs.get(self._key(), -1)
        length = 0
        if at >= 0:
            length = 2
            while length < min(at, MAX_MATCH) and tokens[at - 1 - length] == tokens[seen - 1 - length]:
                length += 1
        self._at, self._length = at, length
        self._add()
