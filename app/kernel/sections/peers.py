"""The section `peers` of the settings: model files that hosts of an installation hand to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from app.kernel.sections.section import Section
from app.kernel.security.origins import is_loopback
from app.kernel.units.sizes import Size

_Model = Annotated[str, StringConstraints(min_length=1, max_length=200)]
_Rate = Annotated[Size, Field(ge=1024, description="a size such as '100MB', at least 1KiB")]
_EVERY = ("0.0.0.0", "::", "")  # noqa: S104 compared, not bound


class PeerSettings(Section):
    """Model files that hosts hand to each other: whether this host serves its own, and which ones it fetches."""

    #: The agent serves the model files of its host to the agents of other hosts.
    serve: bool = False
    #: The address at which it serves them. Another one than loopback needs `tls_certificate`.
    host: str = Field(default="127.0.0.1", max_length=255)
    #: Its port; 0 chooses a free one.
    port: int = Field(default=8475, ge=0, le=65535)
    #: The address by which other hosts reach it, `https://gpu-1.example.com:8475`; by default `host` and `port`.
    url: str = Field(default="", max_length=500, pattern=r"^(https?://[^/?#@\s]+)?$")
    #: Its certificate and private key without a passphrase, as PEM files: both or none. Other hosts trust exactly this
    #: certificate, which the database hands to them: it may be signed by itself. A replaced one is read by a restart.
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    #: The models of the catalogue whose files this host fetches from other hosts when they are missing; `*` is all.
    models: tuple[_Model, ...] = Field(default=(), max_length=1_000)
    #: Most files that are sent at a time; other hosts try again, or elsewhere.
    uploads: int = Field(default=4, ge=1, le=64)
    #: Most bytes in a second that are sent, all files together. By default there is no limit.
    upload_rate: _Rate | None = None
    #: Most bytes in a second that are fetched. By default there is no limit.
    fetch_rate: _Rate | None = None

    @field_validator("tls_certificate", "tls_key")
    @classmethod
    def _made_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("tls_key")
    @classmethod
    def _has_its_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_certificate" in info.data and (info.data["tls_certificate"] is None) != (value is None):
            raise ValueError("peers.tls_certificate and peers.tls_key belong together: set both, or none")
        return value

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        if not self.serve:
            return self
        if self.tls_certificate is None and not (self.host == "localhost" or is_loopback(self.host)):
            raise ValueError(f"host {self.host!r} is reached from other machines: it needs tls_certificate and tls_key")
        if self.host in _EVERY and not self.url:
            raise ValueError(f"host {self.host!r} is every address: url must say by which one other hosts reach it")
        if self.url and self.url.startswith("https://") != (self.tls_certificate is not None):
            wanted = "http://, because there is no" if self.tls_certificate is None else "https://, because there is a"
            raise ValueError(f"url must begin with {wanted} tls_certificate")
        return self
