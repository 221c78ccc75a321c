"""The sections of the servers: the log, the API, Flower, the broker, and TLS to servers."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.security.origins import PageOrigin, ProxyNetwork
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class LogSettings(Section):
    """The level and the format of the log."""

    #: Lines below this level are dropped.
    level: Annotated[Literal["debug", "info", "warning", "error"], CHANGEABLE] = "info"
    #: `auto` means columns at a terminal and JSON elsewhere.
    format: Literal["auto", "columns", "json"] = "auto"


class ApiSettings(Section):
    """The HTTP API."""

    host: str = Field(default="127.0.0.1", description="the address at which the API listens")
    port: int = Field(default=8470, ge=0, le=65535, description="0 chooses a free port")
    #: The URL of the API for commands on this host, if it differs from the address above.
    url: str = Field(default="", pattern=r"^(https?://.+)?$")
    #: The API key that commands send. Programs on the machine of the API need none by default.
    key: SecretStr | None = None
    #: The namespace of commands: of what they create, of names and of lists. By default that of the key.
    namespace: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9._-]{0,62})?$")
    #: Most bytes of a request body; a larger one is refused with 413.
    max_body_bytes: Annotated[int, CHANGEABLE] = Field(default=4 * 1024 * 1024, ge=1024, le=512 * 1024 * 1024)
    #: Most bytes of the inputs, of the output, and of the steps' outputs together, in the answer for a run; longer
    #: values are replaced by references. 0 replaces all.
    max_inline_bytes: Annotated[int, CHANGEABLE] = Field(default=1024 * 1024, ge=0)
    #: A model must begin to work on an interactive call within this time; otherwise the call is refused with 503.
    #: `Prefer: wait=N` of a call prevails. 0 means no limit.
    wait_timeout: Duration = timedelta(minutes=10)
    #: The certificate of the API with its chain, and its private key without a passphrase, as PEM files: both or none.
    #: With them, the API speaks https only. Replaced files are read again.
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    #: Certificates (PEM) that commands trust in addition to those of the system when they call the API.
    ca_file: Path | None = None
    #: Addresses and networks of proxies in front of the API: `10.0.0.7`, `10.1.0.0/16`. Only from these is what
    #: `X-Forwarded-For`, `X-Forwarded-Proto` and `Forwarded` say about the client believed.
    trusted_proxies: tuple[ProxyNetwork, ...] = ()
    #: Origins whose pages may call the API from a browser (CORS): `https://app.example.com`. While it is empty, no page
    #: of another origin may.
    cors_origins: Annotated[tuple[PageOrigin, ...], CHANGEABLE] = ()
    #: Most connections at a time; further ones are closed at once.
    max_connections: int = Field(default=2_000, ge=16, le=100_000)
    #: An idle connection is closed after this time.
    keep_alive: Duration = timedelta(seconds=30)
    #: A client that reads nothing of its answer for this long is disconnected, and its call is stopped.
    write_timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=30)

    @field_validator("tls_certificate", "tls_key", "ca_file")
    @classmethod
    def _made_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("tls_key")
    @classmethod
    def _has_its_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_certificate" in info.data and (info.data["tls_certificate"] is None) != (value is None):
            raise ValueError("api.tls_certificate and api.tls_key belong together: set both, or none")
        return value

    @field_validator("key")
    @classmethod
    def _fits_in_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        text = "" if value is None else value.get_secret_value().strip()
        if not text:
            return None
        if not (text.isascii() and text.isprintable()) or " " in text:
            raise ValueError("an API key has only letters, digits and underscores")
        return SecretStr(text)


class FlowerSettings(Section):
    """Flower, the web page for monitoring the Celery workers."""

    host: str = Field(default="127.0.0.1", description="the address at which Flower listens")
    port: int = Field(default=5555, ge=0, le=65535, description="0 chooses a free port")


class BrokerSettings(Section):
    """Connections to the Celery broker. They must be equal on every host: any worker may redeliver a message."""

    #: After this time an unacknowledged message is delivered again. Messages are acknowledged at once, so this happens
    #: only to a message that a worker received just before it died.
    visibility_timeout: Duration = timedelta(minutes=2)
    #: A connection without an answer for this long is given up.
    socket_timeout: Duration = timedelta(seconds=30)


class TlsSettings(Section):
    """TLS to servers on other machines."""

    #: Connections to Postgres and the broker on other machines that are not verified (docs/many-hosts.md): `warn` logs
    #: them, `require` refuses to start.
    servers: Literal["warn", "require"] = "warn"
