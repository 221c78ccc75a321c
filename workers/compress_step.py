"""
The execution of `compress` steps.

Tokens are counted by the target model's own tokenizer, in a child process that has no weights
(`workers/tokenizers.py`). When a compression needs another model, for vectors or for a summary, the step calls a
workflow: its steps go to the pools of those models, and its last step is the compression again, with what they found.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from app.catalog import files
from app.catalog.catalog import Catalog
from app.kernel.errors import FailureReason, ModelFileUnusable, StepFailure, Unavailable
from app.kernel.security.regex import TextTooLong
from app.memory.compression import compressor, messages, relevance, summary
from app.memory.compression.compressor import ReductionMethod, Target
from app.memory.compression.conversation import Protection
from app.memory.compression.messages import Given, UnusableInput
from app.memory.compression.report import Compressed
from app.workflows.language import definition as definitions
from app.workflows.language.compression import CompressFields
from app.workflows.state_machine.outcomes import Called, Success
from workers.engine import OnStop

#: Returns the number of tokens of each text in the vocabulary of a model's file.
CountInFile = Callable[[Path, Sequence[str]], list[int]]

#: The fields of the output, besides `text` or `messages`.
FIGURES = (
    *("model", "tokens", "ratio", "target_met", "reason", "turns", "sentences", "protected", "dropped", "methods"),
    *("summary", "warnings"),
)
#: The workflow that a step calls.
WORKFLOW = "compress"
#: Share of the characters for each token in the target model's vocabulary that the summary's model is assumed to have.
_CAUTION = 0.7


def compress(
    step: CompressFields,
    value: Any,
    query: str,
    catalog: Catalog,
    data_dir: Path,
    count_in_file: CountInFile,
    *,
    on_stop: OnStop,
    timeout: timedelta,
) -> Success | Called:
    """
    Return the compressed input, or the workflow that asks the models for what is missing.

    Raises StepFailure, and CancelledError when the step was cancelled.
    """
    stopped = threading.Event()
    on_stop(stopped.set)
    until = time.monotonic() + timeout.total_seconds()

    def check() -> None:
        if stopped.is_set():
            raise CancelledError
        if time.monotonic() > until:
            raise StepFailure(FailureReason.TIMEOUT, f"not compressed within {timeout.total_seconds():g} s")

    path = _file_of(step.model, catalog, data_dir)

    def count(texts: Sequence[str]) -> list[int]:
        check()
        try:
            return count_in_file(path, texts)
        except ModelFileUnusable as error:
            raise StepFailure(FailureReason.INVALID_REQUEST, f"the tokens cannot be counted: {error}") from error
        except Unavailable as error:
            raise StepFailure(FailureReason.INTERNAL, str(error)) from error

    try:
        given = messages.given(value, step.keep_recent)
        return _compressed(step, given, query, catalog, count, check)
    except (UnusableInput, TextTooLong) as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from None
    except ValueError as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, f"the input cannot be compressed: {error}") from None


def _compressed(
    step: CompressFields,
    given: Given,
    query: str,
    catalog: Catalog,
    count: Callable[[Sequence[str]], list[int]],
    check: Callable[[], None],
) -> Success | Called:
    protection = Protection(step.protect.patterns, step.protect.texts)
    methods = frozenset(ReductionMethod(method) for method in step.methods)
    target = Target(step.target_ratio, step.max_tokens, methods, protection, query)
    if query and step.embedding_model is not None and given.scores is None:
        if given.vectors is None:
            of = relevance.passages(compressor.split(given.turns, target))
            if of:
                return _with_vectors(step, given, query, [passage.text for passage in of])
        else:
            given = replace(given, scores=_similarities(given))
    done = compressor.compress(given.turns, target, count, dense=given.scores, check=check)
    warnings: list[str] = []
    about: dict[str, Any] | None = None
    text = ""
    if step.summary is not None and done.left_out:
        reserved = step.summary.max_tokens
        if reserved > done.budget // 2:
            message = f"summary.max_tokens ({reserved}) is more than half of the target of {done.budget} tokens"
            raise StepFailure(FailureReason.INVALID_REQUEST, message)
        shorter = compressor.compress(
            given.turns, replace(target, reserved=reserved), count, dense=given.scores, check=check
        )
        if given.summary is None:
            return _with_summary(step, given, query, shorter, catalog)
        if given.summary.strip():
            checked = summary.checked(given.summary, shorter.left_out, lambda one: count([one])[0], reserved)
            text = checked.text
            about = {
                "model": step.summary.model,
                "text": text,
                "tokens": count([text])[0],
                "sentences_removed": len(checked.removed),
                "identifiers_added": checked.added,
                "identifiers_missing": checked.missing,
            }
        else:
            warnings.append("the model wrote no summary; what was left out is not summarised")
        done = shorter if text else done
    return Success(_output(step, given, done, text, about, warnings, count))


def _output(
    step: CompressFields,
    given: Given,
    done: Compressed,
    text: str,
    about: Mapping[str, Any] | None,
    warnings: Sequence[str],
    count: Callable[[Sequence[str]], list[int]],
) -> dict[str, Any]:
    content = messages.result(given, done, text)
    key = "text" if given.is_text else "messages"
    contents = [content] if given.is_text else [message["content"] or "" for message in content]
    # What is returned is counted, whatever was computed on the way.
    done = replace(done, tokens_after=sum(count(contents)), warnings=warnings)
    if done.tokens_after > done.budget and not done.missed:
        done = replace(done, missed=f"{done.tokens_after} tokens are left, {done.budget} were asked for")
    return {key: content, "model": step.model, **done.document(), "summary": about}


def _with_vectors(step: CompressFields, given: Given, query: str, of: Sequence[str]) -> Called:
    """The workflow that computes the vectors of the query and of the passages."""
    embed = {"kind": "embed", "model": step.embedding_model}
    steps = [
        {"id": "query", **embed, "texts": "inputs.query", "task": "query"},
        {"id": "passages", **embed, "texts": "inputs.passages", "task": "document"},
    ]
    found = '{"of": inputs.of, "query_vector": steps.query.output, "vectors": steps.passages.output}'
    return _called(step, given, query, steps, found, {"passages": list(of)})


def _with_summary(step: CompressFields, given: Given, query: str, done: Compressed, catalog: Catalog) -> Called:
    """The workflow that summarises what is left out, part by part."""
    assert step.summary is not None
    entry = catalog.get(step.summary.model)
    tokens = step.summary.max_tokens
    characters = sum(len(turn.content) for turn in given.turns) / max(1, done.tokens_before)
    room = math.floor((entry.context - 2 * tokens - summary.INSTRUCTION) * characters * _CAUTION)
    if room < 200:
        message = f"the context of {entry.name} ({entry.context}) is too small for a summary of {tokens} tokens"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    of = summary.parts(done.left_out, done.conversation.turns, room)
    if len(of) > summary.MAX_PARTS:
        message = (
            f"what is left out has {len(of)} parts for the context of {entry.name}; at most {summary.MAX_PARTS} are "
            "summarised: use a model with a longer context, or a larger target"
        )
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    words = max(15, tokens // 2)
    steps: list[dict[str, Any]] = []
    for number in range(len(of)):
        earlier = f"{{{{ steps.part{number - 1}.output or '' }}}}" if number else ""
        steps.append(
            {
                "id": f"part{number}",
                "kind": "generate",
                "model": step.summary.model,
                "prompt": summary.prompt(f"{{{{ inputs.parts[{number}] }}}}", earlier, words),
                "max_tokens": tokens,
                "sampling": {"temperature": 0.0},
                "allow_failure": True,
                "join": "all_done",
                **({"needs": [f"part{number - 1}"]} if number else {"join": "all"}),
            }
        )
    last = f"steps.part{len(of) - 1}.output"
    scores = ', "scores": inputs.scores' if given.scores is not None else ""
    found = f'{{"of": inputs.of, "summary": {last} == null ? "" : {last}{scores}}}'
    more: dict[str, Any] = {"parts": of}
    if given.scores is not None:
        more["scores"] = list(given.scores)
    return _called(step, given, query, steps, found, more)


def _called(
    step: CompressFields,
    given: Given,
    query: str,
    steps: Sequence[Mapping[str, Any]],
    found: str,
    more: Mapping[str, Any],
) -> Called:
    """The workflow of some steps, and of the compression with what they found."""
    own = step.model_dump(mode="json", by_alias=True, exclude_unset=True)
    fields = {name: value for name, value in own.items() if name in CompressFields.model_fields}
    last = {
        **fields,
        "id": "compressed",
        "kind": "compress",
        "needs": [steps[-1]["id"], *([steps[0]["id"]] if len(steps) > 1 else [])],
        "join": "all_done" if steps[-1]["kind"] == "generate" else "all",
        "input": found,
        **({"query": "{{ inputs.query }}"} if query else {}),
    }
    keys = ("text" if given.is_text else "messages", *FIGURES)
    inputs: dict[str, Any] = {"of": given.document, "query": query, **more}
    document = {
        "workflow": WORKFLOW,
        "inputs": {name: {} for name in inputs},
        "steps": [*steps, last],
        "outputs": {key: f"steps.compressed.output.{key}" for key in keys},
    }
    return Called(definitions.from_document(document), None, inputs)


def _similarities(given: Given) -> list[float]:
    assert given.vectors is not None, "both come together"
    assert given.query_vector is not None, "both come together"
    query = given.query_vector
    return [round(sum(a * b for a, b in zip(vector, query, strict=True)), 6) for vector in given.vectors]


def _file_of(name: str, catalog: Catalog, data_dir: Path) -> Path:
    """Return the file whose vocabulary counts. Raises StepFailure."""
    model = catalog.find(name)
    if model is None:
        raise StepFailure(FailureReason.INVALID_REQUEST, f"the catalogue has no model {name!r}")
    try:
        return files.locate(model, data_dir)
    except ModelFileUnusable as error:
        message = f"the tokens of {name} cannot be counted, because its file is not on this worker's host: {error}"
        raise StepFailure(FailureReason.INVALID_REQUEST, message) from error
