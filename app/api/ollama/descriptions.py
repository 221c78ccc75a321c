"""What is known of a model, in the words of Ollama's API: from its entry in the catalogue and its file's header."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from app.api.ollama.calls import instant
from app.api.services import Services
from app.catalog import files
from app.catalog import header as headers
from app.catalog.metadata import Header
from app.catalog.model import Model
from app.catalog.profiles.resolution import facts_of, resolve
from app.kernel import clock
from app.kernel.errors import ModelFileUnusable

#: Seconds since 1970 of a file that is not on this host.
_EPOCH = 0.0
#: Longest text of a value in `model_info`.
_MAX_VALUE = 10_000


class ModelDetailsOut(BaseModel):
    """What the header of a model's file says; empty texts where its file is not on the host of this API."""

    parent_model: str = ""
    format: str = "gguf"
    family: str = ""
    families: list[str] = []
    parameter_size: str = ""
    quantization_level: str = ""


def writes(model: Model) -> bool:
    """Whether a model writes texts, and is not only for vectors and scores."""
    return not {"embed", "rerank"}.issuperset(model.use_cases)


def capabilities(services: Services, model: Model) -> list[str] | None:
    """What a model can do; None where its file is not on this host."""
    path = path_of(model, services)
    return None if path is None else capabilities_of(model, header_of(path))


def path_of(model: Model, services: Services) -> Path | None:
    """The file of a model; None where this host has none that can be used."""
    try:
        return files.check(model, services.settings.data_dir)
    except ModelFileUnusable:
        return None


def header_of(path: Path) -> Header:
    """The header of a file, which is read again when the file has changed."""
    return _read(path, files.file_version(path))


@lru_cache(maxsize=256)
def _read(path: Path, _: Any) -> Header:
    return headers.read(path)


def modified_at(path: Path | None) -> str:
    """When the file was last changed."""
    seconds = _EPOCH if path is None else files.changed_at(path)
    return instant(datetime.fromtimestamp(seconds, clock.now().tzinfo))


def digest(model: Model, read: Header | None) -> str:
    """The checksum of the file where the catalogue has it, or else that of its header."""
    known = model.source.sha256
    return known[0] if len(known) == 1 else read.digest if read is not None else ""


def details(read: Header | None) -> ModelDetailsOut:
    """What the header says."""
    if read is None:
        return ModelDetailsOut()
    return ModelDetailsOut(
        family=read.architecture,
        families=[read.architecture],
        parameter_size=read.size_label or _size(read.parameters),
        quantization_level=read.quantisation,
    )


def _size(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters)


def info(model: Model, read: Header | None) -> dict[str, Any]:
    """The values of the header that are short, as Ollama names them."""
    if read is None:
        return {"general.architecture": "", "general.parameter_count": 0}
    short = {
        key: value
        for key, value in read.metadata.items()
        if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _MAX_VALUE)
    }
    short.pop("tokenizer.chat_template", None)
    return {**short, "general.parameter_count": read.parameters, "arriero.context_length": model.context}


def template(model: Model, read: Header | None) -> str:
    """The chat template; empty without one."""
    return model.prompt.chat_template or (read.chat_template if read is not None else "") or ""


def capabilities_of(model: Model, read: Header | None) -> list[str]:
    """What a model with that header can do."""
    profile = None if read is None else resolve(model.prompt, facts_of(read, model.prompt))
    found = []
    if "embed" in model.use_cases:
        found.append("embedding")
    if writes(model):
        found.append("completion")
        if (profile is not None and profile.tools) or model.prompt.tools or "tools" in template(model, read):
            found.append("tools")
        if profile is not None and profile.thinks:
            found.append("thinking")
        if model.mmproj is not None:
            found.append("vision")
    return found
