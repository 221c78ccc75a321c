"""The options of the engine that calls a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.kernel.security.egress import EgressPolicy


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """The address and the capabilities of the server."""

    #: The base URL without `/chat/completions`, such as `http://127.0.0.1:8080/v1`.
    url: str
    #: The server's name for the model.
    model: str
    #: Returns the server's key at each call, so that a changed secret takes effect; None sends none.
    api_key: Callable[[], str] | None = None
    #: What connections may reach.
    policy: EgressPolicy = field(default_factory=lambda: EgressPolicy(allow_private=True))
    #: Most requests sent to the server at the same time.
    slots: int = 4
    #: Tokens of prompt and output together that one request may have.
    context: int = 4096
    #: Seconds to connect, and seconds without any data from the server.
    connect_timeout: float = 10.0
    read_timeout: float = 120.0
    #: Further tries, and the most seconds of a Retry-After that is waited for.
    retries: int = 2
    max_retry_wait: float = 20.0
    #: Limits of a minute; None means none.
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    #: Prefixes of texts that are embedded as queries and as documents.
    query_prefix: str = ""
    document_prefix: str = ""
    #: Whether the server accepts llama.cpp's own fields, such as top_k, min_p and grammar.
    llama_fields: bool = True
    #: Further trusted certificates (PEM).
    ca_file: Path | None = None
