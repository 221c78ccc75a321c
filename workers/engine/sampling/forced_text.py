"""
Forced text: what a grammar makes a text continue with, such as the keys and the punctuation of a JSON document.

A grammar is asked which single bytes may come next. While there is only one, it is forced. The copy of the grammar that
walks over the forced bytes is made only where there is one, so most tokens of a free string cost two checked bytes.
The grammars of app.grammar allow one space after a comma or a colon; whether there is one is predicted.

The grammar of the text itself is only read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp as api
import numpy as np

from workers.engine.bindings import native
from workers.engine.bindings.llama import LlamaModel
from workers.engine.sampling.constraint import FirstByteIndex

#: The longest forced text, in bytes.
MAX_FORCED = 128
#: Logits at or below this are masked.
_MASKED = -1e30
_SPACE = 0x20

#: Whether a space is predicted after the text that ends with these forced bytes, where the grammar leaves it open.
HasSpace = Callable[[bytes], bool]


class ForcedText:
    """Finds the forced text of grammars. Only the engine's thread uses it."""

    def __init__(self, model: LlamaModel, index: FirstByteIndex) -> None:
        """`index` is prepared. Bytes without a token of their own are not known to be allowed."""
        self._bytes = bytes(index.token_of_byte)
        self._tokens = list(index.token_of_byte.values())
        self._places = {byte: place for place, byte in enumerate(self._bytes)}
        # A text that may end is not forced to go on, so its end counts as one more continuation.
        self._data = np.zeros(len(self._tokens) + bool(model.end_tokens), native.TOKEN_DATA)
        self._ids = np.array([*self._tokens, *sorted(model.end_tokens)[:1]], np.int32)
        #: Two continuations that were allowed last: if they still are, nothing is forced.
        self._pair = self._ids[:2].copy()
        self._array: Any = api.llama_token_data_array()
        self._pointer = self._data.ctypes.data_as(ctypes.POINTER(api.llama_token_data))

    def after(self, grammar: Any, has_space: HasSpace) -> tuple[bytes, int]:
        """
        Return the forced text after what the grammar has accepted, and how many of its bytes do not depend on a space.

        At most `MAX_FORCED` bytes, which may end inside a character.
        """
        if self._is_open(grammar):
            return b"", 0
        found, certain = bytearray(), -1
        copy: Any = None
        try:
            while len(found) < MAX_FORCED:
                byte, is_certain = self._next(grammar if copy is None else copy, bytes(found), has_space)
                if byte is None:
                    break
                if certain < 0 and not is_certain:
                    certain = len(found)
                copy = native.clone(grammar) if copy is None else copy
                native.accept(copy, self._tokens[self._places[byte]])
                found.append(byte)
        finally:
            if copy is not None:
                native.free_sampler(copy)
        return bytes(found), len(found) if certain < 0 else certain

    def _is_open(self, grammar: Any) -> bool:
        """Whether the two continuations that were allowed last are allowed again."""
        return len(self._allowed(grammar, self._pair)) == len(self._pair)

    def _next(self, grammar: Any, found: bytes, has_space: HasSpace) -> tuple[int | None, bool]:
        """Return the next byte, or None where it is free, and whether it is the only one that is allowed."""
        allowed = self._allowed(grammar, self._ids)
        if len(allowed) > 1:
            self._pair = self._ids[allowed[:2]]
        at_end = bool(len(allowed)) and allowed[-1] >= len(self._bytes)
        if at_end or not 0 < len(allowed) <= 2:
            return None, False
        bytes_ = [self._bytes[place] for place in allowed.tolist()]
        if len(bytes_) == 1:
            return bytes_[0], True
        if _SPACE not in bytes_:
            return None, False
        bytes_.remove(_SPACE)
        return _SPACE if has_space(found) else bytes_[0], False

    def _allowed(self, grammar: Any, ids: Any) -> Any:
        """Return the places in `ids` of the tokens that the grammar allows."""
        data = self._data[: len(ids)]
        data["id"], data["logit"] = ids, 1.0
        self._array.data, self._array.size, self._array.selected, self._array.sorted = (
            self._pointer,
            len(ids),
            -1,
            False,
        )
        native.apply(grammar, ctypes.byref(self._array))
        return (data["logit"] > _MASKED).nonzero()[0]
