"""
The tokenizer of a model, without its weights: a program that counts the tokens of texts.

    python -m workers.engine.bindings.vocabulary FILE

Each line of standard input is a JSON list of texts; each line of standard output is the list of their numbers of
tokens, or `{"error": …}`. It ends with its input, or after a minute without a line.

It runs as its own process, which sees no GPU: llama.cpp would make a driver context on each, even for a vocabulary.
It reads the file's header and vocabulary, and no weights.
"""

from __future__ import annotations

import json
import os
import resource
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as api

from app.kernel.errors import ArrieroError
from workers.engine.bindings import llama, load_errors, native

#: Seconds without a line after which the program ends.
_IDLE = 60


class Vocabulary:
    """The vocabulary of a model file."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileMissing, ModelFileDamaged, ModelUnsupported."""
        native.hide_gpus()
        native.start()
        llama.check_file(path)
        params = api.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = True, 0
        with native.captured_log() as lines:
            self._model: Any = api.llama_model_load_from_file(os.fsencode(path), params)
            if not self._model:
                raise load_errors.load_error(path, lines())
        self._vocab = api.llama_model_get_vocab(self._model)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, without those that begin or end a prompt."""
        counts = []
        for text in texts:
            data = text.encode("utf-8", "replace")
            found = native.tokenize(self._vocab, data, len(data), None, 0, False, False)
            counts.append(abs(found))
        return counts

    def close(self) -> None:
        """Free the vocabulary."""
        api.llama_model_free(self._model)


def main() -> int:
    """Answer lines until the input ends. Returns the exit code."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        vocabulary = Vocabulary(Path(sys.argv[1]))
    except ArrieroError as error:
        _answer({"error": str(error)})
        return 0
    _answer([])
    while select.select([sys.stdin], [], [], _IDLE)[0] and (line := sys.stdin.readline()):
        _answer(vocabulary.count(json.loads(line)))
    return 0


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
