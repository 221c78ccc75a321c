"""The HTTP client through which commands call the API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import httpx2

from app.access import operator_key
from app.access.namespaces import LABEL
from app.cli.processes import records
from app.kernel.errors import ArrieroError, Conflict, InvalidInput, ModelFileUnusable, NotFound, Problem, Unavailable
from app.kernel.sections.servers import ApiSettings
from app.kernel.security.tls import verification
from app.kernel.settings import Settings

_DEFAULT_PORT = ApiSettings().port

#: The beginnings of paths with names that belong to a namespace, or of requests for many runs.
_NAMED = (
    "/v1/workflows",
    "/v1/schedules",
    "/v1/bulk/",
    "/v1/blocks",
    "/v1/block-templates",
    "/v1/context",
    "/v1/memories",
    "/v1/actions",
    "/v1/alerts",
    "/v1/conversations",
    "/v1/users/",
    "/v1/rules",
    "/v1/firings",
    "/v1/handoffs",
    "/v1/signals",
)
#: What follows a refusal for want of a key.
_KEY_HINT = "; commands send the setting api.key (ARRIERO_API__KEY)"
#: Seconds without a byte after which a stream is given up: a waiting one has a comment every few seconds.
_STREAM_TIMEOUT = 60.0


class RequestRefused(ArrieroError):
    """The API rejected the request for a reason that has no error class of its own."""


class _RemoteNotFound(NotFound):
    """Nothing has that name or id; the message is that of the API."""

    def __init__(self, detail: str) -> None:
        Exception.__init__(self, detail)


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """A server-sent event."""

    #: The data; empty for a comment.
    data: str
    #: The text of a comment.
    comment: str = ""


class Client:
    """Calls the API and converts its problem documents to errors."""

    def __init__(
        self,
        url: str,
        timeout: float = 30.0,
        key: str | None = None,
        namespace: str = "",
        api: ApiSettings | None = None,
    ) -> None:
        """
        `timeout` is in seconds, `key` an API key, `api` the settings that say whose certificates are trusted.

        `namespace` is that of names and lists; empty: not chosen. Raises InvalidSettings for a file of certificates
        that cannot be used.
        """
        self.url, self._namespace = url, namespace
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # For plain HTTP no certificates are loaded: that takes longer than a call.
        trusted = verification(url, api or ApiSettings())
        self._http = httpx2.Client(base_url=url, timeout=timeout, trust_env=False, verify=trusted, headers=headers)

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON of a resource."""
        given = {name: value for name, value in parameters.items() if value is not None}
        return self._call("GET", path, params=given)

    def post(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Any:
        """Post JSON. Returns the JSON of the answer."""
        given = {name: value for name, value in (parameters or {}).items() if value is not None}
        return self._call("POST", path, json=body, headers=dict(headers or {}), params=given)

    def put(self, path: str, body: Any, **parameters: Any) -> Any:
        """Put JSON. Returns the JSON of the answer."""
        given = {name: value for name, value in parameters.items() if value is not None}
        return self._call("PUT", path, json=body, params=given)

    def patch(self, path: str, body: Any) -> Any:
        """Patch JSON. Returns the JSON of the answer."""
        return self._call("PATCH", path, json=body)

    def put_text(self, path: str, text: str, media_type: str) -> Any:
        """Put text. Returns the JSON of the answer."""
        return self._call("PUT", path, content=text.encode(), headers={"Content-Type": media_type})

    def delete(self, path: str, **parameters: Any) -> Any:
        """Delete a resource. Returns the JSON of the answer, or None."""
        return self._call("DELETE", path, params=parameters)

    def upload(self, path: str, name: str, content: BinaryIO, fields: Mapping[str, str]) -> Any:
        """Post a form with a file, which is read as it is sent. Returns the JSON of the answer."""
        timeout = httpx2.Timeout(30.0, read=_STREAM_TIMEOUT)
        return self._call("POST", path, files={"file": (name, content)}, data=dict(fields), timeout=timeout)

    @contextmanager
    def download(self, path: str) -> Iterator[Iterator[bytes]]:
        """Yield the content of a resource in parts."""
        try:
            with self._http.stream("GET", path) as response:
                if not response.is_success:
                    response.read()
                    raise _error(response)
                yield response.iter_bytes()
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    @contextmanager
    def stream(self, path: str, body: Any) -> Iterator[Iterator[ServerEvent]]:
        """Post JSON, and yield the server-sent events of the answer. Leaving the block ends the request."""
        timeout = httpx2.Timeout(30.0, read=_STREAM_TIMEOUT)
        try:
            with self._http.stream("POST", path, json=body, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    raise _error(response)
                yield _events(response.iter_lines())
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _call(self, method: str, path: str, **more: Any) -> Any:
        if self._namespace:
            more = _chosen(self._namespace, method, path, more)
        try:
            response = self._http.request(method, path, **more)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if response.is_success:
            return response.json() if response.content else None
        raise _error(response)

    def _unreachable(self, error: httpx2.TransportError) -> Unavailable:
        return Unavailable(
            f"no API answers at {self.url} ({error}); start everything with `arriero up`, "
            "or set another address with --set api.url=… or ARRIERO_API__URL"
        )


@contextmanager
def connected(settings: Settings, timeout: float = 30.0) -> Iterator[Client]:
    """Yield a client of the API at the address in the settings. `timeout` is in seconds, for each answer."""
    url = url_of(settings)
    with connected_to(url, timeout, key_of(settings, url), settings.api.namespace, settings.api) as client:
        yield client


@contextmanager
def connected_to(
    url: str, timeout: float = 30.0, key: str | None = None, namespace: str = "", api: ApiSettings | None = None
) -> Iterator[Client]:
    """Yield a client of the API at an address. `timeout` is in seconds, for each answer; all as in `Client`."""
    client = Client(url, timeout, key, namespace, api)
    try:
        yield client
    finally:
        client.close()


def url_of(settings: Settings) -> str:
    """
    Return the base URL of the API, as seen from this host.

    Where no port is set, it is that of the `arriero up` that runs on the data directory, if there is one.
    """
    if settings.api.url:
        return settings.api.url.rstrip("/")
    if settings.api.port in (0, _DEFAULT_PORT) and (running := records.running(settings.data_dir)) is not None:
        return running.api or api_url_at(settings.api)
    return api_url_at(settings.api)


def api_url_at(api: ApiSettings) -> str:
    """Return the URL, as seen from this host, of the API with these settings."""
    return url_at(api.host, api.port, "http" if api.tls_certificate is None else "https")


def key_of(settings: Settings, url: str) -> str | None:
    """
    Return the API key for calls of a URL: that of the settings, or that of the operator of this machine.

    The latter goes only to the API of the `arriero up` that runs on the data directory.
    """
    if settings.api.key is not None:
        return settings.api.key.get_secret_value()
    key = operator_key.read(settings.data_dir)
    if key is None or (running := records.running(settings.data_dir)) is None:
        return None
    return key if running.api == url else None


def url_at(host: str, port: int, scheme: str = "http") -> str:
    """Return the URL, as seen from this host, of a server that listens on an address."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 compared, not bound
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _chosen(namespace: str, method: str, path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a request that acts in a namespace, where the API lets its caller choose one."""
    if method == "POST" and path == "/v1/runs":
        body = request["json"]
        return {**request, "json": {**body, "labels": {LABEL: namespace, **body.get("labels", {})}}}
    if path.startswith(_NAMED) or (method == "GET" and path == "/v1/runs"):
        return {**request, "params": {"namespace": namespace, **(request.get("params") or {})}}
    return request


def _events(lines: Iterator[str]) -> Iterator[ServerEvent]:
    """Events whose data is one line, as those of this API are."""
    for line in lines:
        name, _, value = line.partition(":")
        if name == "data":
            yield ServerEvent(value.removeprefix(" "))
        elif not name and value:
            yield ServerEvent("", value.strip())


def _error(response: httpx2.Response) -> ArrieroError:
    try:
        body = response.json()
        if "error" in body:
            return _openai_error(response.status_code, body["error"])
        detail = str(body["detail"])
        found = [Problem(e["where"], e["message"], e["accepted"], e["line"]) for e in body.get("errors", ())]
    except (ValueError, KeyError, TypeError):
        return RequestRefused(f"{response.request.method} {response.request.url}: HTTP {response.status_code}")
    match response.status_code:
        case 413 | 415 | 422 if found:
            return InvalidInput(found, str(body["title"]).removeprefix("invalid "))
        case 404:
            return _RemoteNotFound(detail)
        case 409 if "model-file" in body["type"]:
            return ModelFileUnusable(detail)
        case 409:
            return Conflict(detail)
        case 503:
            return Unavailable(detail)
        case 401:
            return RequestRefused(f"{detail}{_KEY_HINT}")
        case _:
            return RequestRefused(detail)


def _openai_error(status: int, error: Mapping[str, Any]) -> ArrieroError:
    """Return the error of an answer in the form of OpenAI's API."""
    message = str(error["message"])
    match status:
        case 400 | 413 | 415:
            return InvalidInput([Problem("", message)], "request")
        case 404:
            return _RemoteNotFound(message)
        case 409:
            return Conflict(message)
        case 503:
            return Unavailable(message)
        case 401:
            return RequestRefused(f"{message}{_KEY_HINT}")
        case _:
            return RequestRefused(message)
