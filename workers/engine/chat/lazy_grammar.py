"""
The lazy grammar: inactive while a text is free, and active from the first tool call on.

llama.cpp has lazy grammars too. They are not used here: they abort the process when the token that opens a call
continues with text that the grammar rejects, and they search the whole text at every token.
Here such a token is rejected before it is added to the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.engine.bindings import native
from workers.engine.bindings.llama import LlamaModel
from workers.engine.chat import calls
from workers.engine.chat.calls import ToolCallDetector, ToolCallStyle
from workers.engine.sampling.constraint import FirstByteIndex
from workers.engine.sampling.grammars import CompiledGrammar

#: Whether a grammar allows a token.
Allows = Callable[[Any, int], bool]


class LazyGrammar:
    """The lazy grammar of one text. Only the engine's thread uses it."""

    def __init__(
        self,
        model: LlamaModel,
        byte_index: FirstByteIndex,
        compiled: CompiledGrammar,
        style: ToolCallStyle,
        prefill: str,
    ) -> None:
        """`prefill` is the text that the model continues. The byte index must be prepared."""
        self._model, self._byte_index, self._compiled = model, byte_index, compiled
        # The beginning of a call is ASCII, so each byte can be handled as a character.
        self._detector = ToolCallDetector(style)
        self._detector.feed(prefill.encode().decode("latin-1"))

    def accept(self, token: int, allows: Allows) -> tuple[bool, Any]:
        """
        Try a token. Returns whether it is allowed, and the grammar for the rest of the text if the token began a call.

        The caller frees the grammar. A rejected token changes nothing.
        """
        detector = self._detector.peek(self._model.piece(token).decode("latin-1"))
        if detector.calls is None:
            self._detector = detector
            return True, None
        grammar = self._compiled.new_sampler()
        for byte in calls.normalise_start(detector.calls, detector.style).encode("latin-1"):
            single = self._byte_index.token_of_byte.get(byte)
            if single is None or not allows(grammar, single):
                native.free_sampler(grammar)
                return False, None
            native.accept(grammar, single)
        return True, grammar
