"""The servers of models, asked from a terminal: whether they answer, accept the key, and list the model."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx2

from app.catalog.model import Model
from app.catalog.serving import servability
from app.catalog.serving.remote_options import RemoteEntry
from app.kernel.errors import ModelServerUnusable
from app.kernel.security import egress, masking
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings

#: Seconds for the answer, and most bytes that are read of it.
_TIMEOUT, _MAX_BYTES = 10.0, 4 * 2**20


def probe(model: Model, remote: RemoteEntry, settings: Settings) -> dict[str, Any]:
    """
    Ask the server of a model for its models: `listed` says whether this one is among them.

    Raises ModelServerUnusable when it may not be called, does not answer, or refuses.
    """
    servability.check(model, settings)
    servability.require_secret(model, settings)
    _check_addresses(remote)
    name = remote.api_key
    key = None if name is None else Secrets(settings.secrets_dir).reveal([name])[name]
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx2.Client(trust_env=False, timeout=_TIMEOUT) as client:
            request = client.build_request("GET", f"{remote.url}/models", headers=headers)
            answer = client.send(request, stream=True)
            raw = b""
            for block in answer.iter_bytes():
                raw += block
                if len(raw) > _MAX_BYTES:
                    break
    except httpx2.HTTPError as error:
        said = str(error) or type(error).__name__
        raise ModelServerUnusable(f"{remote.url} cannot be reached: {said}") from None
    if answer.status_code >= 400 and answer.status_code not in (404, 405):
        said = masking.masked(raw[:500].decode(errors="replace"), () if key is None else (key,))
        raise ModelServerUnusable(f"{remote.url} refuses ({answer.status_code}): {said}")
    return {"url": remote.url, "status": answer.status_code, "listed": remote.model in _names(raw)}


def _check_addresses(remote: RemoteEntry) -> None:
    parts = urlsplit(remote.url)
    try:
        found = socket.getaddrinfo(remote.host, parts.port or egress.PORTS[parts.scheme], type=socket.SOCK_STREAM)
    except OSError as error:
        raise ModelServerUnusable(f"the name {remote.host} cannot be resolved: {error.strerror}") from None
    for *_, endpoint in found:
        refusal = remote.policy.refuse_address(remote.host, str(endpoint[0]))
        if refusal is not None:
            hint = refusal.replace("the setting http.allow_private", "`private = true` in its catalogue entry")
            raise ModelServerUnusable(f"{remote.url} may not be called: {hint}")


def _names(raw: bytes) -> set[str]:
    try:
        data = json.loads(raw)["data"]
        return {str(one["id"]) for one in data}
    except (ValueError, LookupError, TypeError, RecursionError):
        return set()
