"""
The lazy grammar: inactive while a text is free. It is active from the first tool call on, or from the end of the
thinking.

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
from workers.engine.chat.calls import ToolCallDetector
from workers.engine.chat.thinking import AnswerSplitter
from workers.engine.sampling.constraint import FirstByteIndex
from workers.engine.sampling.grammars import CompiledGrammar

#: Whether a grammar allows a token.
Allows = Callable[[Any, int], bool]
#: Tokens of whitespace between the thinking and a text with a grammar; then the grammar begins.
_MAX_WHITE = 4


class LazyGrammar:
    """The lazy grammar of one text. Only the engine's thread uses it."""

    def __init__(
        self,
        model: LlamaModel,
        byte_index: FirstByteIndex,
        compiled: CompiledGrammar,
        detector: ToolCallDetector | None,
        splitter: AnswerSplitter | None = None,
    ) -> None:
        """
        Without a detector, the grammar begins with the answer, after the thinking. The byte index must be prepared.

        Both get the bytes of the text as characters: their tags are `as_bytes`, too.
        """
        self._model, self._byte_index, self._compiled = model, byte_index, compiled
        self._detector, self._splitter = detector, splitter
        self._white = 0

    def accept(self, token: int, allows: Allows) -> tuple[bool, Any]:
        """
        Try a token. Returns whether it is allowed, and the grammar for the rest of the text if the token began it.

        A grammar with a token that is not allowed begins before that token. The caller frees the grammar.
        """
        text, splitter = self._model.piece(token).decode("latin-1"), self._splitter
        if self._detector is None:
            return self._after_thinking(token, text, allows)
        if splitter is not None:
            splitter = splitter.copy()
            _, text = splitter.feed(text)
        detector = self._detector.peek(text)
        if detector.calls is None:
            self._detector, self._splitter = detector, splitter
            return True, None
        return self._begin(calls.normalise_start(detector.calls, detector.style), allows)

    def _after_thinking(self, token: int, text: str, allows: Allows) -> tuple[bool, Any]:
        """As `accept`, for a grammar that begins with the answer. The text cannot end before."""
        assert self._splitter is not None, "without thinking, the grammar is active from the beginning"
        if not self._splitter.is_thinking:
            if text and not text.strip() and self._white < _MAX_WHITE:
                self._white += 1
                return True, None
            return False, self._compiled.new_sampler()
        if token in self._model.end_tokens:
            return False, None
        splitter = self._splitter.copy()
        _, answer = splitter.feed(text)
        if answer:
            return self._begin(answer, allows)
        self._splitter = splitter
        return True, None

    def _begin(self, text: str, allows: Allows) -> tuple[bool, Any]:
        grammar = self._compiled.new_sampler()
        for byte in text.encode("latin-1"):
            single = self._byte_index.token_of_byte.get(byte)
            if single is None or not allows(grammar, single):
                native.free_sampler(grammar)
                return False, None
            native.accept(grammar, single)
        return True, grammar
