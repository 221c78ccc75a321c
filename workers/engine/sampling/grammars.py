"""
The grammar cache: grammars for structured output, compiled once and kept, with the validator of the finished text.

app.grammar converts a JSON Schema to GBNF, which llama.cpp parses. A compiled grammar is cloned for each request, which
is cheaper than parsing it again. The finished text is validated against the schema in any case.
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
from workers.engine.bindings import native
from workers.engine.bindings.llama import LlamaModel

#: Compiled grammars that are kept.
_CAPACITY = 128
_ROOT = re.compile(r"^\s*root\s*::=", re.MULTILINE)

#: Converts a JSON Schema to GBNF. Raises InvalidInput that names what it does not support.
ToGbnf = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class CompiledGrammar:
    """A compiled grammar, and the schema of the finished text. The grammar is freed with this object."""

    #: llama.cpp's grammar sampler. It is only cloned, never used itself.
    _compiled: Any
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Free the compiled grammar when the last reference to this object is gone."""
        weakref.finalize(self, native.free_sampler, self._compiled).atexit = False

    def new_sampler(self) -> Any:
        """Return a clone in its initial state. The caller frees it."""
        return native.clone(self._compiled)

    def check(self, text: str) -> None:
        """Raises StepFailure, which keeps the text, when the text does not conform to the schema."""
        if self.schema is not None:
            answers.require(text, self.schema)


class GrammarCache:
    """The compiled grammars of one model, the most recently used ones kept. Safe from any thread."""

    def __init__(self, model: LlamaModel, to_gbnf: ToGbnf) -> None:
        self._model, self._to_gbnf = model, to_gbnf
        self._grammars: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        #: How often a grammar was found, and how often it had to be compiled.
        self.hits = 0
        self.misses = 0

    def for_schema(self, schema: Mapping[str, Any]) -> CompiledGrammar:
        """Return the grammar of a JSON Schema. Raises StepFailure for an invalid or unsupported schema."""
        key = "schema:" + json.dumps(schema, default=str)
        return self._ensure(key, lambda: self._compile_schema(schema))

    def for_gbnf(self, source: str) -> CompiledGrammar:
        """Return the compiled grammar of GBNF source with a rule `root`. Raises StepFailure when it is invalid."""
        return self._ensure("gbnf:" + source, lambda: CompiledGrammar(self._compile(source)))

    def gbnf_for_schema(self, schema: Mapping[str, Any]) -> str:
        """Return the GBNF source for a JSON Schema. Raises StepFailure for an unsupported schema."""
        try:
            return self._to_gbnf(schema)
        except InvalidInput as error:
            raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from error

    def close(self) -> None:
        """Drop the compiled grammars."""
        with self._lock:
            self._grammars.clear()

    def _ensure(self, key: str, make: Callable[[], CompiledGrammar]) -> CompiledGrammar:
        with self._lock:
            grammar = self._grammars.get(key)
            if grammar is not None:
                self.hits += 1
                self._grammars.move_to_end(key)
                return grammar
            self.misses += 1
            grammar = self._grammars[key] = make()
            while len(self._grammars) > _CAPACITY:
                self._grammars.popitem(last=False)
            return grammar

    def _compile_schema(self, schema: Mapping[str, Any]) -> CompiledGrammar:
        return CompiledGrammar(self._compile(self.gbnf_for_schema(schema)), schema)

    def _compile(self, source: str) -> Any:
        if not _ROOT.search(source):
            raise StepFailure(FailureReason.INVALID_REQUEST, "the grammar has no rule named root")
        if "\0" in source:
            raise StepFailure(FailureReason.INVALID_REQUEST, "the grammar contains a NUL character")
        with native.captured_log() as lines:
            compiled = api.llama_sampler_init_grammar(self._model.vocab, source.encode(), b"root")
            if not compiled:
                why = "; ".join(lines()[:1]) or "llama.cpp's parser rejected it"
                raise StepFailure(FailureReason.INVALID_REQUEST, f"the grammar cannot be parsed: {why}")
        return compiled
