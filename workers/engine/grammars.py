"""
Grammars: what forces a text into a form, compiled once and kept, and the check of what came out.

A JSON Schema becomes GBNF by app.grammar; llama.cpp's parser reads GBNF. A compiled grammar is copied for each
request, which is cheaper than parsing it. The finished text is validated against the schema all the same.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import llama_cpp as api

from app.inference import answers
from app.kernel.errors import FailureReason, InvalidInput, StepFailure
from workers.engine import native
from workers.engine.llama import LlamaModel

#: Compiled grammars that are kept.
_KEPT = 128
_ROOT = re.compile(r"^\s*root\s*::=", re.MULTILINE)

#: Turns a JSON Schema into GBNF; raises InvalidInput, naming what it does not support.
ToGbnf = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Form:
    """What a text must be: its grammar, and the schema of what came out. The grammar is freed with it."""

    #: The compiled grammar: copied, never used itself.
    _compiled: Any
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """See to it that the compiled grammar goes with the last who holds this."""
        weakref.finalize(self, native.free_sampler, self._compiled).atexit = False

    def sampler(self) -> Any:
        """A grammar at its beginning, which the caller frees."""
        return native.clone(self._compiled)

    def check(self, text: str) -> None:
        """Raise StepFailure, with the text kept, when it is not what the schema says."""
        if self.schema is not None:
            answers.require(text, self.schema)


class Grammars:
    """The compiled grammars of one model. Any thread may ask."""

    def __init__(self, model: LlamaModel, to_gbnf: ToGbnf) -> None:
        self._model, self._to_gbnf = model, to_gbnf
        self._forms: OrderedDict[str, Form] = OrderedDict()
        self._lock = threading.Lock()
        #: How often a grammar was there, and how often it had to be compiled.
        self.hits = 0
        self.misses = 0

    def of_schema(self, schema: Mapping[str, Any]) -> Form:
        """The form of a JSON Schema. Raises StepFailure when it is none, or uses what cannot be forced."""
        key = "schema:" + json.dumps(schema, default=str)
        return self._form(key, lambda: self._compile_schema(schema))

    def of_gbnf(self, source: str) -> Form:
        """The form of a GBNF grammar with the rule `root`. Raises StepFailure when it is none."""
        return self._form("gbnf:" + source, lambda: Form(self._compile(source)))

    def gbnf_of(self, schema: Mapping[str, Any]) -> str:
        """The grammar's source. Raises StepFailure."""
        try:
            return self._to_gbnf(schema)
        except InvalidInput as error:
            raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from error

    def close(self) -> None:
        """Let go of the compiled grammars."""
        with self._lock:
            self._forms.clear()

    def _form(self, key: str, make: Callable[[], Form]) -> Form:
        with self._lock:
            form = self._forms.get(key)
            if form is not None:
                self.hits += 1
                self._forms.move_to_end(key)
                return form
            self.misses += 1
            form = self._forms[key] = make()
            while len(self._forms) > _KEPT:
                self._forms.popitem(last=False)
            return form

    def _compile_schema(self, schema: Mapping[str, Any]) -> Form:
        return Form(self._compile(self.gbnf_of(schema)), schema)

    def _compile(self, source: str) -> Any:
        if not _ROOT.search(source):
            raise StepFailure(FailureReason.INVALID_REQUEST, "the grammar has no rule named root")
        if "\0" in source:
            raise StepFailure(FailureReason.INVALID_REQUEST, "the grammar holds a NUL character")
        with native.lines() as lines:
            compiled = api.llama_sampler_init_grammar(self._model.vocab, source.encode(), b"root")
            if not compiled:
                why = "; ".join(lines()[:1]) or "llama.cpp's parser refused it"
                raise StepFailure(FailureReason.INVALID_REQUEST, f"the grammar cannot be read: {why}")
        return compiled
