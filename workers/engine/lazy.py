"""
A grammar that sleeps while a text is free, and takes over where its calls of tools begin.

llama.cpp has such grammars. They are not used: one ends the process when the token that opens a call goes on with
something that the grammar refuses, and it searches the whole text at every token.
Here such a token is refused before it is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.engine import calls, native
from workers.engine.calls import Style, ToolCallWatch
from workers.engine.constraint import Alphabet
from workers.engine.grammars import Form
from workers.engine.llama import LlamaModel

#: Whether a grammar lets a token stand.
Passes = Callable[[Any, int], bool]


class Lazy:
    """The sleep of one text's grammar. It belongs to the engine's thread."""

    def __init__(self, model: LlamaModel, alphabet: Alphabet, form: Form, style: Style, before: str) -> None:
        """`before` is what the text goes on from. The alphabet is prepared."""
        self._model, self._alphabet, self._form = model, alphabet, form
        # What opens a call is ASCII, so that a byte may stand for a character.
        self._watch = ToolCallWatch(style)
        self._watch.feed(before.encode().decode("latin-1"))

    def take(self, token: int, passes: Passes) -> tuple[bool, Any]:
        """
        Go on with a token: whether it may stand, and the grammar that binds the text from then on, if a call began.

        The caller frees the grammar. A token that begins a call which the grammar refuses changes nothing.
        """
        watch = self._watch.after(self._model.piece(token).decode("latin-1"))
        if watch.calls is None:
            self._watch = watch
            return True, None
        grammar = self._form.sampler()
        for byte in calls.entrance(watch.calls, watch.style).encode("latin-1"):
            single = self._alphabet.singles.get(byte)
            if single is None or not passes(grammar, single):
                native.free_sampler(grammar)
                return False, None
            native.accept(grammar, single)
        return True, grammar
