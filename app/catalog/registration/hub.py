"""
The Hugging Face hub: the files of a repository, with their sizes and hashes, by one call of its API.

A mirror has the same paths (setting `catalog.hub`). The token is sent to that host only, and is in no message.
What the hub answers is bounded, and nothing in it is trusted: names are checked as those of a catalogue are.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2
from pydantic import SecretStr

from app.catalog import download
from app.catalog.download import TransientFailure
from app.catalog.registration import reference as references
from app.catalog.registration.reference import HubReference
from app.catalog.source import HubSource, split_parts
from app.kernel.errors import DownloadFailed
from app.kernel.security import texts

#: Maximum bytes of an answer, and maximum files of a repository.
_MAX_BYTES, _MAX_FILES = 16 << 20, 20_000
#: Attempts, and seconds before the second one; the delay is doubled each time.
_ATTEMPTS, _DELAY = 4, 0.5
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; what the hub does not say is None."""

    size: int | None
    sha256: str | None


def resolve(
    reference: HubReference, hub: str, token: SecretStr | None, *, sleep: Callable[[float], None] = time.sleep
) -> tuple[HubSource, HubSource | None]:
    """
    Returns the source that a reference means: the file, with its size and hash, at the commit of this moment; and that
    of the projector (mmproj) in its repository, or None.

    Raises DownloadFailed, and InvalidInput when the repository has no such file.
    """
    commit, files = _listing(reference, hub, token, sleep)
    first = references.choose(reference, list(files))
    projector = references.choose_projector(first, list(files))
    model = _source(reference, hub, commit, files, first)
    return model, None if projector is None else _source(reference, hub, commit, files, projector)


def _source(
    reference: HubReference, hub: str, commit: str | None, files: Mapping[str, RemoteFile], first: str
) -> HubSource:
    parts = split_parts(first)
    if missing := [part for part in parts if part not in files]:
        raise DownloadFailed(f"{_page(reference, hub)} lacks {missing[0]}, a part of {first}")
    sizes, hashes = [files[part].size for part in parts], [files[part].sha256 for part in parts]
    return HubSource(
        hf=reference.repository,
        file=first,
        revision=commit or reference.revision,
        size=tuple(size for size in sizes if size) if all(sizes) else (),
        sha256=tuple(value for value in hashes if value) if all(hashes) else (),
    )


def _listing(
    reference: HubReference, hub: str, token: SecretStr | None, sleep: Callable[[float], None]
) -> tuple[str | None, Mapping[str, RemoteFile]]:
    path = f"api/models/{reference.repository}/revision/{quote(reference.revision, safe='')}"
    url = f"{hub.rstrip('/')}/{path}?blobs=true"
    headers = {"Accept": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token.get_secret_value()}"
    with download.http_client() as client:
        for attempt in range(_ATTEMPTS):
            try:
                return _parsed(_answer(client, url, headers, reference, hub))
            except TransientFailure as error:
                if attempt == _ATTEMPTS - 1:
                    raise DownloadFailed(f"{_page(reference, hub)}: {error.reason}") from None
                sleep(_DELAY * 2**attempt if error.delay is None else min(error.delay, download.MAX_DELAY))
    raise AssertionError("the last attempt returns or raises")


def _answer(client: httpx2.Client, url: str, headers: Mapping[str, str], reference: HubReference, hub: str) -> Any:
    host = urlsplit(hub).netloc
    with download.translated(url), client.stream("GET", url, headers=headers) as response:
        status = response.status_code
        code = texts.printable(response.headers.get("x-error-code", ""), 80)
        answer = f"HTTP {status}{f', {code}' if code else ''}"
        if urlsplit(hub).scheme == "https" and response.url.scheme != "https":
            raise DownloadFailed(f"{host} redirects to {response.url.host} without encryption")
        if status in download.TRANSIENT:
            after = response.headers.get("retry-after", "")
            raise TransientFailure(f"{host} answers {answer}", delay=float(after) if after.isdigit() else None)
        if status != 200:
            raise DownloadFailed(_refusal(reference, hub, status, answer, with_token="Authorization" in headers))
        data = b""
        for block in response.iter_bytes():
            data += block
            if len(data) > _MAX_BYTES:
                raise DownloadFailed(f"{_page(reference, hub)}: the list of files has more than {_MAX_BYTES:,} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise DownloadFailed(
            f"{_page(reference, hub)}: {host} sends no JSON; is catalog.hub the hub or a mirror?"
        ) from None


def _refusal(reference: HubReference, hub: str, status: int, answer: str, *, with_token: bool) -> str:
    host, page = urlsplit(hub).netloc, _page(reference, hub)
    if status == 404:
        revision = "" if reference.revision == "main" else f", or it has no revision {reference.revision}"
        return f"{host} has no repository {reference.repository}{revision} ({answer}); check its spelling at {page}"
    return download.refusal(host, status, answer, page, with_token=with_token)


def _parsed(answer: Any) -> tuple[str | None, Mapping[str, RemoteFile]]:
    commit = answer.get("sha") if isinstance(answer, dict) else None
    listed = answer.get("siblings") if isinstance(answer, dict) else None
    files: dict[str, RemoteFile] = {}
    for entry in listed[:_MAX_FILES] if isinstance(listed, list) else ():
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if isinstance(name, str) and name.isprintable() and len(name) < 500:
            lfs = entry["lfs"] if isinstance(entry.get("lfs"), dict) else {}
            size, sha256 = lfs.get("size", entry.get("size")), lfs.get("sha256")
            files[name] = RemoteFile(
                size if type(size) is int and size > 0 else None,
                sha256 if isinstance(sha256, str) and _SHA256.match(sha256) else None,
            )
    return (commit if isinstance(commit, str) and _COMMIT.match(commit) else None), files


def _page(reference: HubReference, hub: str) -> str:
    return f"{hub.rstrip('/')}/{reference.repository}"
