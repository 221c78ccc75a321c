"""
Channels: where notifications go.

A channel names secrets and holds none: they are variables or files of the control workers, as for steps. A web hook may
go only to hosts that the setting `http.allowed_hosts` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, TypeAdapter, ValidationError

from app.kernel.errors import InvalidInput, Problem

#: The severities, the mildest first.
SEVERITIES = ("info", "warning", "critical")

_SecretName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
_Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}$")]
_HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9-]{0,63}$")]
_NAME_OF_SECRET = "the name of a secret: lower-case letters, digits, '_'"  # noqa: S105 a description


class ChannelKind(StrEnum):
    """How a notification is delivered."""

    LOG = "log"
    WEBHOOK = "webhook"
    EMAIL = "email"
    APPRISE = "apprise"


class ChannelFields(BaseModel):
    """What all channels have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ChannelKind
    #: Takes the alerts of rules that name no channel.
    default: StrictBool = Field(default=False, description="true or false")
    #: Milder alerts are not sent.
    min_severity: Literal["info", "warning", "critical"] = Field(
        default="info", description="info, warning or critical"
    )
    #: Whether the end of an alert is sent too.
    resolved: StrictBool = Field(default=True, description="true or false")

    def takes(self, severity: str) -> bool:
        """Whether it takes alerts of a severity."""
        return SEVERITIES.index(severity) >= SEVERITIES.index(self.min_severity)


class LogChannel(ChannelFields):
    """The log of the control worker."""

    kind: Literal[ChannelKind.LOG]


class WebhookChannel(ChannelFields):
    """A web hook: see https://www.standardwebhooks.com."""

    kind: Literal[ChannelKind.WEBHOOK]
    url: str = Field(default="", max_length=2_000, description="a URL that begins with https:// or http://")
    #: The secret that is the URL, for receivers whose URL is one.
    url_secret: _SecretName | None = Field(default=None, description=_NAME_OF_SECRET)
    #: The secret that signs: `whsec_` and base64, or any text of at least 24 characters.
    secret: _SecretName | None = Field(default=None, description=_NAME_OF_SECRET)
    #: Further headers, by name the secret that is the value.
    header_secrets: dict[_HeaderName, _SecretName] = Field(
        default_factory=dict, max_length=8, description="an object: by name of a header, the name of a secret"
    )


class EmailChannel(ChannelFields):
    """E-mail, over the server of the settings `alerts.smtp_…`."""

    kind: Literal[ChannelKind.EMAIL]
    to: tuple[_Address, ...] = Field(min_length=1, max_length=20, description="a list of addresses")


class AppriseChannel(ChannelFields):
    """Any service of the library apprise. Needs the extra `apprise` on the control workers."""

    kind: Literal[ChannelKind.APPRISE]
    url_secret: _SecretName = Field(description=_NAME_OF_SECRET)


AnyChannel = Annotated[LogChannel | WebhookChannel | EmailChannel | AppriseChannel, Field(discriminator="kind")]
_CHANNEL: TypeAdapter[AnyChannel] = TypeAdapter(AnyChannel)
_CLASSES: Mapping[str, type[ChannelFields]] = {
    get_args(one.model_fields["kind"].annotation)[0]: one for one in get_args(get_args(AnyChannel)[0])
}

#: The channel that is always there.
LOG = "log"


@dataclass(frozen=True, slots=True)
class AlertChannel:
    """A channel, as it is stored."""

    namespace: str
    name: str
    document: dict[str, Any]
    #: Why it takes nothing any more; empty while it does.
    disabled: str

    @property
    def fields(self) -> AnyChannel:
        """The fields of its kind. Raises InvalidInput when they are not valid in this version."""
        return parse(self.document, "")


def parse(document: Any, namespace: str) -> AnyChannel:
    """Return the channel of a JSON object, of a namespace or the installation. Raises InvalidInput."""
    if not isinstance(document, Mapping):
        raise InvalidInput([Problem("", "it is not an object", "an object with `kind`")], "channel")
    try:
        found = _CHANNEL.validate_python({**document})
    except ValidationError as error:
        problems = [_problem(item, document) for item in error.errors(include_url=False)]
        raise InvalidInput(problems, "channel") from None
    problems = list(_more_problems(found, namespace))
    if problems:
        raise InvalidInput(problems, "channel")
    return found


def _more_problems(channel: AnyChannel, namespace: str) -> list[Problem]:
    problems = []
    match channel:
        case AppriseChannel() if namespace:
            problems.append(
                Problem("kind", "apprise calls servers without a check; only operators may use it", "webhook")
            )
        case WebhookChannel(url=url, url_secret=secret) if bool(url) == bool(secret):
            problems.append(Problem("url", "exactly one of url and url_secret is needed", "a URL, or a secret"))
        case WebhookChannel(secret=str() as secret) if secret.startswith("whsec_"):
            problems.append(Problem("secret", "it is a secret itself, and not the name of one", _NAME_OF_SECRET))
        case WebhookChannel(url=url) if url and (wrong := _wrong_url(url)):
            problems.append(Problem("url", wrong, "a URL such as https://hooks.example.com/path"))
    return problems


def _wrong_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "it is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable():
        return "it is not a URL"
    return "a user and password in it would be shown; use header_secrets or url_secret" if parts.username else ""


def _problem(item: Any, document: Mapping[str, Any]) -> Problem:
    path = [str(part) for part in item["loc"]]
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return Problem("kind", f"{str(document.get('kind'))[:50]!r} is not a kind of channel", ", ".join(ChannelKind))
    fields = _CLASSES[str(document["kind"])].model_fields
    path = path[1:]
    field = fields.get(path[0]) if path else None
    if item["type"] == "extra_forbidden":
        return Problem(".".join(path), "there is no such field", ", ".join(fields))
    message = "it is missing" if item["type"] == "missing" else item["msg"].removeprefix("Value error, ")
    return Problem(".".join(path), message, (field.description or "") if field else "")
