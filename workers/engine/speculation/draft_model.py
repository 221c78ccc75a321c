"""
The draft model: a second, smaller model in the same process, whose tokens are those of the model.

Loading checks that the two go together. Anything else is refused with the names of both files and the difference.
"""

from __future__ import annotations

from typing import Any

import llama_cpp as api

from app.kernel.errors import ModelUnsupported
from workers.engine.bindings.llama import LlamaModel, truncation_problem
from workers.engine.options import DraftFile, EngineOptions, KvLayout
from workers.engine.speculation.model_drafts import ModelDrafts

#: Bytes of a token's text that an error shows.
_SHOWN = 40


def draft_options(options: EngineOptions) -> EngineOptions:
    """Return the options of the draft model: slots, cells and devices of the model, each slot with its own buffer."""
    shared = (
        "slots", "context", "batch", "ubatch", "threads", "threads_batch", "most_threads", "kv_type_k", "kv_type_v",
        "flash_attention", "mmap", "mlock", "gpu_layers", "split_mode", "tensor_split", "main_gpu",
    )  # fmt: skip
    given = {name: getattr(options, name) for name in shared}
    return EngineOptions(layout=KvLayout.STREAMS, vectors=False, speculation="off", **given)


def load_draft(model: LlamaModel, options: EngineOptions, draft: DraftFile) -> LlamaModel:
    """
    Load the draft model of a model.

    Raises what `LlamaModel` raises, and ModelUnsupported when drafts are impossible or can never gain.
    """
    if (why := truncation_problem(model, options)) is not None:
        message = f"it is the draft model of {model.path.name}, whose state cannot be truncated, because {why}"
        raise ModelUnsupported(draft.path, f"{message}; accepted is an entry without engine.draft")
    found = LlamaModel(draft.path, draft_options(options))
    if (problem := _problem(model, found)) is None:
        return found
    found.close()
    raise ModelUnsupported(draft.path, f"it cannot be the draft model of {model.path.name}: {problem}")


def open_drafts(model: LlamaModel, options: EngineOptions, draft: DraftFile) -> ModelDrafts:
    """Load the draft model and create its context. Raises what `load_draft` and `Context` raise."""
    found = load_draft(model, options, draft)
    try:
        return ModelDrafts(found, found.options, draft.most, _size(found) / _size(model))
    except BaseException:
        found.close()
        raise


def _problem(model: LlamaModel, draft: LlamaModel) -> str | None:
    """Return why the second model cannot draft for the first; None when it can."""
    if not draft.has_decoder or draft.pooling is not None:
        return "it computes vectors and writes no text; accepted is a model that writes text"
    if draft.recurrent:
        return "its state cannot be truncated, because it is recurrent; accepted is a model with a KV cache only"
    difference = vocabulary_difference(model, draft)
    if difference is not None:
        return f"{difference}; accepted is a model with the same vocabulary"
    if (theirs := _size(draft)) > (ours := _size(model)):
        return f"its weights have {theirs:,} bytes, more than the {ours:,} of the model; accepted is a smaller model"
    return None


def vocabulary_difference(model: LlamaModel, draft: LlamaModel) -> str | None:
    """Return the first difference of two vocabularies: of their types, their sizes or a token; None without one."""
    kinds = [one.meta("tokenizer.ggml.model") or "unknown" for one in (model, draft)]
    if kinds[0] != kinds[1] or api.llama_vocab_type(model.vocab) != api.llama_vocab_type(draft.vocab):
        return f"its tokenizer is of the type {kinds[1]}, that of the model of the type {kinds[0]}"
    if model.n_vocab != draft.n_vocab:
        return f"its vocabulary has {draft.n_vocab:,} tokens, that of the model {model.n_vocab:,}"
    text = api.llama_vocab_get_text
    ours, theirs = model.vocab, draft.vocab
    for token in range(model.n_vocab):
        if text(ours, token) != text(theirs, token):
            return f"its token {token} is {_shown(text(theirs, token))}, that of the model {_shown(text(ours, token))}"
    return None


def _size(model: LlamaModel) -> int:
    """Return the bytes of the weights."""
    return int(api.llama_model_size(model.pointer))


def _shown(text: Any) -> str:
    return repr((text or b"")[:_SHOWN].decode("utf-8", "replace"))
