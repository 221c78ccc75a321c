"""The options of the engine that calls a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.catalog.model import Model
from app.kernel.security.egress import EgressPolicy
from app.kernel.security.secrets import Secrets


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

    @staticmethod
    def of(model: Model, ca_file: Path | None, secrets: Secrets) -> RemoteOptions:
        """The options of a model of the catalogue that a server serves."""
        remote = model.remote
        assert remote is not None, "it has a server"
        name = remote.api_key
        return RemoteOptions(
            url=remote.url,
            model=remote.model,
            api_key=None if name is None else lambda: secrets.reveal([name])[name],
            policy=remote.policy,
            slots=model.slots,
            context=model.context,
            connect_timeout=remote.connect_timeout.total_seconds(),
            read_timeout=remote.read_timeout.total_seconds(),
            retries=remote.retries,
            max_retry_wait=remote.max_retry_wait.total_seconds(),
            requests_per_minute=remote.requests_per_minute,
            tokens_per_minute=remote.tokens_per_minute,
            query_prefix=model.prompt.query_prefix,
            document_prefix=model.prompt.document_prefix,
            llama_fields=remote.llama_fields,
            ca_file=ca_file,
        )
