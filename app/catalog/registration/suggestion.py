"""
Suggestions: the entry of a model, derived from the header of its file.

The name is `family:size`, with the quantisation and a number where that is needed to be unique.
Whether the model chats, completes, embeds or reranks follows from its chat template and its pooling type.
Context and slots suit most machines; the context never exceeds that of the training.

Nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from app.catalog.metadata import Header
from app.catalog.model import Model, ProjectorEntry, slug
from app.catalog.registration.reference import quantisation_of
from app.catalog.source import ModelSource

#: Context and slots of a suggested entry.
DEFAULT_CONTEXT, DEFAULT_SLOTS = 4096, 4

_OTHER_KINDS = {
    "mmproj": "it is a projector (mmproj) for images or sound, which is used with a model and is not a model itself",
    "adapter": "it is an adapter (LoRA), which is used with a model and is not a model itself",
    "imatrix": "it is an importance matrix, which is used to quantise a model",
}
_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:x\d+)?(?:\.\d+)?[kmbt](?:-a\d+(?:\.\d+)?[mb])?)(?![a-z0-9])")
#: llama.cpp's LLAMA_POOLING_TYPE_RANK: a model that scores pairs of texts.
_RANK = 4
#: What templates of models without a system role raise.
_NO_SYSTEM_ROLE = re.compile(r"system role (?:is )?not supported", re.IGNORECASE)
#: A variable of templates with which a model answers without thinking first: its answers are short and keep a schema.
_THINKING = "enable_thinking"
#: By a part of the name, the prefixes that embedding models were trained with: of queries, and of documents.
_PREFIXES: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (re.compile(r"nomic-embed-text"), "search_query: ", "search_document: "),
    (re.compile(r"(?:^|-)e5-(?:small|base|large)"), "query: ", "passage: "),
    (
        re.compile(r"bge-(?:small|base|large)-en|mxbai-embed-large|arctic-embed"),
        "Represent this sentence for searching relevant passages: ",
        "",
    ),
)


def unservable(read: Header) -> str | None:
    """Returns why a complete file is not that of a model, or None."""
    if read.kind in _OTHER_KINDS:
        return _OTHER_KINDS[read.kind]
    if read.kind != "model":
        return f"its type is {read.kind!r}, not a model"
    if not read.tensors:
        return "it has no tensors: it is only a vocabulary"
    return None


def suggest(read: Header, source: ModelSource, name: str, mmproj: ProjectorEntry | None = None) -> Model:
    """Returns the entry of a model with this header, and with a projector. Its other values are the defaults."""
    uses, values = _use_cases(read), dict[str, Any]()
    if mmproj is not None and "chat" in uses:
        uses, values = (*uses, "vision"), {"mmproj": mmproj}
    if "embed" in uses:
        values |= _of_embedding(read)
    elif prompt := _prompt(read.chat_template or ""):
        values |= {"prompt": prompt}
    return Model.model_validate(
        {
            "name": name,
            "description": f"{read.name}, {read.quantisation}",
            "licence": read.licence or "",
            "use_cases": uses,
            "context": max(32, min(read.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)),
            "slots": DEFAULT_SLOTS,
            "source": source,
            **values,
        }
    )


def unique_name(read: Header, slugs: Collection[str]) -> str:
    """Returns a name whose slug is none of these."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", read.path.stem)
    if (tag := quantisation_of(read.path.name)) and stem.upper().endswith(tag):
        stem = stem[: -len(tag)].rstrip("-._") or stem
    known = read.metadata.get("general.basename")
    text = _name_part(known if isinstance(known, str) else stem)
    size = _name_part(read.size_label or "") or (match[1] if (match := _SIZE.search(stem.lower())) else "")
    before_size = re.sub(rf"(?<![a-z0-9]){re.escape(size)}.*", "", text) if size else text
    family = _name_part(before_size) or _name_part(read.architecture)
    size = size or _name_part(read.quantisation) or "gguf"
    first = f"{family[:30]}:{size[:12]}"
    full = f"{first}-{_name_part(read.quantisation)}" if _name_part(read.quantisation) not in size else first
    candidates = [first, full, *(f"{full}-{number}" for number in range(2, len(slugs) + 3))]
    return next(name for name in candidates if slug(name) not in slugs)


def _use_cases(read: Header) -> tuple[str, ...]:
    if read.metadata.get(f"{read.architecture}.pooling_type") == _RANK:
        return ("rerank",)
    if read.has_pooling_type or "bert" in read.architecture or "embed" in _identity(read):
        return ("embed",)
    return ("chat",) if read.chat_template else ("complete",)


def _of_embedding(read: Header) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not read.has_pooling_type and "bert" not in read.architecture:
        # A generative model that was trained to embed: its last token has seen the whole text.
        found["engine"] = {"pooling": "last"}
    for pattern, query, document in _PREFIXES:
        if pattern.search(_identity(read)):
            found["prompt"] = {"query_prefix": query, "document_prefix": document}
    return found


def _prompt(template: str) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    if _THINKING in template:
        found["arguments"] = {_THINKING: False}
    if _NO_SYSTEM_ROLE.search(template):
        found["system"] = "user"
    return found


def _identity(read: Header) -> str:
    return f"{_name_part(read.name)} {_name_part(read.path.stem)}"


def _name_part(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")
