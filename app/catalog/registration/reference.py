"""
References: what users type to name the file of a model that no catalogue has.

    hf.co/USER/REPO                       the repository's file with the quantisation Q4_K_M, or its only one
    hf.co/USER/REPO:QUANT                 the file with this quantisation
    hf.co/USER/REPO/FOLDER/FILE.gguf      this file
    https://huggingface.co/USER/REPO/…    as a browser shows it: a repository, or a file of it (`blob`, `resolve`)
    https://example.com/x.gguf            any other server
    /data/x.gguf, ./x.gguf, ~/x.gguf      a file of this host

Of a split file any part may be named. Nothing here opens a file or a connection.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from app.catalog.source import split_number, split_parts
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security import texts

#: The accepted forms, for messages.
ACCEPTED = (
    "the name of a model, hf.co/USER/REPO[:QUANT], hf.co/USER/REPO/FILE.gguf, an https:// URL, or a path to a .gguf"
)
#: The quantisation that is chosen when none is named.
DEFAULT_QUANTISATION = "Q4_K_M"
#: Maximum characters of a reference.
_MAX = 2_000
#: Host names of the Hugging Face hub.
_HUBS = ("hf.co", "huggingface.co", "www.huggingface.co")
_WORD = re.compile(r"[A-Za-z0-9][\w.-]*")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
#: The quantisation at the end of a file name, before the number of a part.
_QUANTISATION = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))(?:-\d{5}-of-\d{5})?\.gguf$",
    re.IGNORECASE,
)
#: Of a repository's projectors, the one that is chosen: encoders of images lose much when they are quantised.
_PROJECTORS = ("F16", "BF16", "Q8_0", "F32")
#: Files of a repository that are no models.
_NO_MODEL = re.compile(r"mmproj|imatrix|(^|[-_./])mtp-", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A file of a repository of the hub."""

    repository: str
    #: None means the default one.
    quantisation: str | None = None
    #: A path in the repository; None means the file with the quantisation.
    file: str | None = None
    revision: str = "main"


@dataclass(frozen=True, slots=True)
class UrlReference:
    """A file at any server."""

    url: str


@dataclass(frozen=True, slots=True)
class PathReference:
    """A file of this host."""

    path: Path


Reference = HubReference | UrlReference | PathReference


def parse(text: str, hub: str = "") -> Reference | None:
    """
    Parses a reference; returns None for a text of another form, such as the name of a model.

    `hub` is the setting `catalog.hub`: URLs of a mirror are references to the hub too.

    Raises InvalidInput for a reference with a mistake.
    """
    if len(text) > _MAX or any(not char.isprintable() for char in text):
        raise _invalid(text[:80], "this is too long, or has control characters")
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
    except ValueError:
        raise _invalid(text, "this is not a URL, nor the name of a model") from None
    host = (parts.netloc or "").lower()
    if host in _HUBS or (hub and parts.scheme and host == urlsplit(hub).netloc.lower()):
        return _hub(text, unquote(parts.path))
    if parts.scheme in ("http", "https"):
        return UrlReference(_first_url(text))
    if "://" in text:
        raise _invalid(text, f"the scheme {parts.scheme!r} is not supported")
    if text.lower().endswith(".gguf") or text.startswith(("/", "./", "../", "~")):
        try:
            path = Path(text).expanduser().absolute()
        except RuntimeError as error:  # there is no such user
            raise _invalid(text, str(error)) from None
        return PathReference(_first_path(path))
    return None


def quantisation_of(file: str) -> str | None:
    """Returns the quantisation that the name of a file says, in upper case."""
    found = _QUANTISATION.search(file)
    return found[1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else None


def choose(reference: HubReference, files: Sequence[str]) -> str:
    """
    Returns the file, or the first part, that the reference means among the files of its repository.

    Raises InvalidInput, which lists what there is.
    """
    models = [file for file in files if file.lower().endswith(".gguf") and not _NO_MODEL.search(file)]
    models = [file for file in models if (split_number(file) or (1, 1))[0] == 1]
    where = f"hf.co/{reference.repository}"
    if not models:
        raise _invalid(
            where, "this repository has no GGUF file", "a repository with GGUF files, whose names often end in -GGUF"
        )
    if reference.file is not None:
        if reference.file not in models:
            raise _invalid(f"{where}/{reference.file}", "the repository has no such file", _listed(models))
        return reference.file
    by_tag: dict[str, list[str]] = {}
    for file in models:
        by_tag.setdefault(quantisation_of(file) or "", []).append(file)
    tag = (reference.quantisation or DEFAULT_QUANTISATION).upper()
    found = by_tag.get(tag, [])
    if not found and reference.quantisation is None and len(models) == 1:
        return models[0]
    if len(found) == 1:
        return found[0]
    if found:
        accepted = _listed([f"{where}/{file}" for file in found])
        raise _invalid(where, f"{len(found)} files have the quantisation {tag}; name one of them", accepted)
    known = sorted(tag for tag in by_tag if tag) or models
    what = (
        f"no file has the quantisation {tag}"
        if reference.quantisation
        else f"it has no file with {tag}; choose another"
    )
    raise _invalid(
        where, what, _listed([f"{where}:{one}" if known is not models else f"{where}/{one}" for one in known])
    )


def choose_projector(model: str, files: Sequence[str]) -> str | None:
    """
    Returns the file that encodes images for a model of the same repository, or None.

    By the hub's custom its name contains `mmproj`, and it is in the folder of the model, or in the repository's first.
    """
    named = [file for file in files if "mmproj" in PurePosixPath(file).name.lower() and file.lower().endswith(".gguf")]
    for folder in (PurePosixPath(model).parent, PurePosixPath(".")):
        here = [file for file in named if PurePosixPath(file).parent == folder and not split_number(file)]
        if len(here) == 1:
            return here[0]
        for wanted in _PROJECTORS:
            if len(found := [file for file in here if quantisation_of(file) == wanted]) == 1:
                return found[0]
    return None


def _hub(text: str, path: str) -> HubReference:
    words = [word for word in path.split("/") if word]
    if len(words) < 2:
        raise _invalid(text, "there is no repository", "hf.co/USER/REPO")
    revision, rest, tag = "main", words[2:], None
    if len(words) > 3 and words[2] in ("resolve", "blob", "tree"):
        revision, rest = words[3], words[4:]
    if not rest and ":" in words[1]:
        words[1], _, tag = words[1].partition(":")
        if not _TAG.fullmatch(tag):
            raise _invalid(text, f"{tag!r} is not a quantisation", f"such as {DEFAULT_QUANTISATION} or Q8_0")
    if not all(_WORD.fullmatch(word) for word in words[:2]) or ".." in words or not _TAG.fullmatch(revision):
        raise _invalid(text, "this is not a repository of the hub", "hf.co/USER/REPO[:QUANT]")
    file = "/".join(rest) or None
    if file is not None and not file.lower().endswith(".gguf"):
        raise _invalid(text, f"{file!r} does not end in .gguf", "hf.co/USER/REPO/FILE.gguf")
    return HubReference(f"{words[0]}/{words[1]}", tag, None if file is None else _first(file), revision)


def _first(file: str) -> str:
    """Returns the name of the first part of a split file; of another file, its own name."""
    return split_parts(file)[0]


def _first_url(url: str) -> str:
    parts = urlsplit(url)
    name = PurePosixPath(unquote(parts.path)).name
    if not name.lower().endswith(".gguf"):
        raise _invalid(url, "the URL does not end in the name of a .gguf file", "https://HOST/…/NAME.gguf")
    return url.replace(name, _first(name), 1) if split_number(name) else url


def _first_path(path: Path) -> Path:
    if not path.name.lower().endswith(".gguf"):
        raise _invalid(str(path), "this is not the path of a .gguf file", "a path that ends in .gguf")
    return path.with_name(_first(path.name))


def _listed(names: Sequence[str], most: int = 30) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _invalid(where: str, message: str, accepted: str = ACCEPTED) -> InvalidInput:
    problem = Problem(texts.printable(where), texts.printable(message), texts.printable(accepted))
    return InvalidInput([problem], "reference of a model")
