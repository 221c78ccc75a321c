"""The sections `actions`, `alerts` and `serving` of the settings: what runs by itself, and what it has changed."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field, SecretStr, StringConstraints, field_validator

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration

_Serving = tuple[Annotated[str, StringConstraints(max_length=1000)], ...]


class ActionSettings(Section):
    """What rules may do."""

    #: `on`: rules act. `dry_run`: what they would do is recorded, and nothing is done. `off`: nothing is recorded.
    #: Alerts are sent in any case.
    mode: Annotated[Literal["on", "dry_run", "off"], CHANGEABLE] = "on"
    #: Interval of the job that carries out actions. A firing starts one in addition.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=1)
    #: Most actions of all rules together within an hour, alerts excepted. Further ones are refused.
    max_per_hour: Annotated[int, Field(ge=0, le=100_000), CHANGEABLE] = 120
    #: Most hosts that are quarantined at the same time, as a part of all hosts. The last one never is.
    max_quarantined: Annotated[float, Field(ge=0, le=1), CHANGEABLE] = 0.34
    #: Retention of what was done.
    retention: Annotated[Duration, durations.at_least("1h"), CHANGEABLE] = timedelta(days=90)


class AlertSettings(Section):
    """Alerts, and their delivery."""

    #: Interval of the job that sends notifications.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=1)
    #: An alert is not sent again within this time, unless its rule says otherwise.
    cooldown: Annotated[Duration, durations.at_least("1s"), CHANGEABLE] = timedelta(minutes=15)
    #: Alerts of a group that are opened within this time are sent together.
    group_wait: Annotated[Duration, durations.at_least("0s"), CHANGEABLE] = timedelta(seconds=2)
    #: A group is sent at most once within this time, as far as new alerts are concerned.
    group_interval: Annotated[Duration, durations.at_least("0s"), CHANGEABLE] = timedelta(minutes=1)
    #: Retention of resolved alerts and of notifications.
    retention: Annotated[Duration, durations.at_least("1h"), CHANGEABLE] = timedelta(days=90)
    #: Time for one attempt to deliver.
    timeout: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=15)
    #: The server of e-mail. Without it, channels of e-mail are refused.
    smtp_host: str = Field(default="", max_length=253)
    smtp_port: int = Field(default=587, ge=1, le=65535)
    #: `starttls`: encrypted after the greeting. `tls`: from the beginning. `none`: not at all, and without a password.
    smtp_security: Literal["starttls", "tls", "none"] = "starttls"
    smtp_user: str = Field(default="", max_length=200)
    smtp_password: SecretStr | None = None
    #: The sender of e-mail.
    smtp_from: str = Field(default="", max_length=254)
    #: The address of the dashboard, for links in notifications; without it there are none.
    link: str = Field(default="", max_length=500)

    @field_validator("link")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value.rstrip("/")


class ServingSettings(Section):
    """What rules and operators have changed of the serving of models, for as long as it holds."""

    #: Models that are not served: their steps wait, and calls go to their fallbacks or are refused.
    paused: Annotated[_Serving, CHANGEABLE] = ()
    #: `MODEL=OTHER+OTHER`: requests for a model go to others, in this order.
    diverted: Annotated[_Serving, CHANGEABLE] = ()
    #: `MODEL=NUMBER`: slots of a model, in the place of those in the catalogue.
    slots: Annotated[_Serving, CHANGEABLE] = ()
    #: Classes of which new calls and submissions are refused: `batch`, `standard`.
    shed: Annotated[tuple[Literal["batch", "standard"], ...], CHANGEABLE] = ()

    @field_validator("diverted")
    @classmethod
    def _names_others(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            model, _, others = entry.partition("=")
            if not model or not others or model in others.split("+") or not all(others.split("+")):
                raise ValueError(f"{entry!r} is not of the form 'MODEL=OTHER' or 'MODEL=OTHER+OTHER'")
        return value

    @field_validator("slots")
    @classmethod
    def _has_numbers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            model, _, number = entry.rpartition("=")
            if not model or not number.isascii() or not number.isdigit() or not 1 <= int(number[:9]) <= 256:
                raise ValueError(f"{entry!r} is not of the form 'MODEL=NUMBER', with a number from 1 to 256")
        return value
