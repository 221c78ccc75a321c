"""
Remote options of one model: the OpenAI-compatible server that serves it, instead of a file of a host.

They are the table `[models.remote]` of an entry. The key of the server is a secret, which is named and never written.
A server is called only when its entry allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, StrictInt, StringConstraints, field_validator

from app.catalog.source import CatalogTable
from app.kernel.security import egress
from app.kernel.security.egress import EgressPolicy, EgressRule
from app.kernel.units import durations
from app.kernel.units.durations import Duration

#: Tokens for which prices are given.
_PRICED_TOKENS = Decimal(1_000_000)
_NAME = r"^[A-Za-z][A-Za-z0-9_]{0,62}$"


def _bounded(value: timedelta) -> timedelta:
    if not timedelta(milliseconds=100) <= value <= timedelta(hours=1):
        raise ValueError("the duration must be from 100ms to 1h")
    return value


_Time = Annotated[Duration, AfterValidator(_bounded)]
_Price = Annotated[StrictFloat | StrictInt, Field(ge=0, le=1_000_000)]


@dataclass(frozen=True, slots=True)
class TokenPrices:
    """Prices of a million tokens, in the currency of the settings."""

    input: Decimal
    #: Of tokens of a prompt that the server had in its cache.
    cached: Decimal
    output: Decimal

    def of(self, tokens_in: int, tokens_cached: int, tokens_out: int) -> Decimal:
        """Return the exact price of these tokens; the cached ones are among those that were read."""
        cached = max(0, min(tokens_cached, tokens_in))
        total = (tokens_in - cached) * self.input + cached * self.cached + tokens_out * self.output
        return total / _PRICED_TOKENS


class RemoteEntry(CatalogTable):
    """The table `[models.remote]` of a catalogue entry."""

    url: Annotated[str, StringConstraints(max_length=500)] = Field(
        description="the base URL without /chat/completions, such as 'https://api.example.com/v1'"
    )
    #: The server's name of the model.
    model: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(
        description="the name of the model at the server"
    )
    #: Without it the model is never served.
    allowed: StrictBool = Field(default=False, description="true or false")
    #: Whether the server may have an address of this machine or of a private network.
    private: StrictBool = Field(default=False, description="true or false")
    #: The name of the secret with the server's key; None sends none.
    api_key: Annotated[str, StringConstraints(pattern=_NAME)] | None = Field(
        default=None, description="the name of a secret (a variable ARRIERO_SECRET_NAME, or a file of secrets_dir)"
    )
    connect_timeout: _Time = Field(default=timedelta(seconds=10), description="a duration such as '10s'")
    #: The longest time without any data of the server.
    read_timeout: _Time = Field(default=timedelta(minutes=2), description="a duration such as '2m'")
    #: Further tries after a connection failed, or after an answer 429 or 503 with Retry-After.
    retries: StrictInt = Field(default=2, ge=0, le=10, description="a whole number from 0 to 10")
    #: The longest Retry-After that is waited for.
    max_retry_wait: _Time = Field(default=timedelta(seconds=20), description="a duration such as '20s'")
    #: None means no limit.
    requests_per_minute: StrictInt | None = Field(
        default=None, ge=1, le=1_000_000, description="a whole number, at least 1"
    )
    tokens_per_minute: StrictInt | None = Field(
        default=None, ge=1, le=1_000_000_000, description="a whole number, at least 1"
    )
    #: Prices of a million tokens, in the currency of the settings (`costs.currency`).
    cost_in: _Price = Field(default=0.0, description="a number, at least 0")
    #: Of tokens that the server had in its cache; None: as of others.
    cost_cached: _Price | None = Field(default=None, description="a number, at least 0")
    cost_out: _Price = Field(default=0.0, description="a number, at least 0")
    #: Whether the server accepts llama.cpp's own fields, such as top_k, min_p and grammar.
    llama_fields: StrictBool = Field(default=False, description="true or false")

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"this is not a URL: {error}") from None
        if parts.scheme not in egress.PORTS or not parts.hostname or egress.host(parts.hostname) is None or port == 0:
            raise ValueError("this is not an http:// or https:// URL with a host")
        if parts.username or parts.password:
            raise ValueError("a URL with user or password would appear in logs")
        if parts.query or parts.fragment:
            raise ValueError("a base URL has neither a query nor a fragment")
        return value.rstrip("/")

    @property
    def host(self) -> str:
        """The host of the server, as rules write it."""
        found = egress.host(urlsplit(self.url).hostname or "")
        assert found is not None, "the URL was checked"
        return found

    @property
    def policy(self) -> EgressPolicy:
        """What a connection to the server may reach: its host, and there only addresses that the entry allows."""
        parts = urlsplit(self.url)
        port = parts.port or egress.PORTS[parts.scheme]
        return EgressPolicy((EgressRule(self.host, port=port),), allow_private=self.private)

    @property
    def prices(self) -> TokenPrices | None:
        """The prices of its tokens; None when it has none."""
        if not self.cost_in and not self.cost_out and not self.cost_cached:
            return None
        given = (self.cost_in, self.cost_in if self.cost_cached is None else self.cost_cached, self.cost_out)
        return TokenPrices(*(Decimal(str(price)) for price in given))

    def shown(self) -> dict[str, object]:
        """Return the table for people: with the name of the secret, which is no secret."""
        return {
            key: durations.show(value) if isinstance(value, timedelta) else value
            for key, value in self.model_dump(exclude_none=True).items()
        }
