"""The section of the scaler: which hosts may be added and given up, and who is asked for them."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration
from app.kernel.units.sizes import Size

_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
_Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]
_Seconds = durations.at_least("1s")


class ScaledClass(Section):
    """A table `[[scaler.classes]]`: hosts of one kind, of which more can be had."""

    #: Its name for the receiver, such as the name of an instance group.
    name: _Name
    #: The type of the devices of such a host, as `arriero devices` shows it: `NVIDIA L4`, `cpu`.
    type: _Text
    #: The memory of one device that pools may use, and the devices of a host.
    bytes: Size
    devices: int = Field(default=1, ge=1, le=64)
    #: A pattern of the names of such hosts. Others are neither counted nor given up.
    match: _Text = "*"
    #: The least and the greatest number of hosts.
    min: int = Field(default=0, ge=0, le=10_000)
    max: int = Field(default=1, ge=0, le=10_000)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is greater than max ({self.max})")
        if self.bytes <= 0:
            raise ValueError("bytes must be greater than 0")
        return self


class ScalerSettings(Section):
    """The scaler asks for hosts, and gives up hosts that are not needed. Without classes it does nothing."""

    #: `on`: it asks, and drains hosts. `dry_run`: it decides and shows, and changes nothing. `off`: nothing.
    mode: Annotated[Literal["on", "dry_run", "off"], CHANGEABLE] = "off"
    #: The kinds of hosts: tables `[[scaler.classes]]`.
    classes: tuple[ScaledClass, ...] = Field(default=(), max_length=32)
    #: Where it asks by POST, signed as by Standard Webhooks; `http.allowed_hosts` holds.
    url: str = Field(default="", max_length=2_000)
    #: The name of the secret that signs its requests.
    secret: str = Field(default="", max_length=63)
    #: Instead of a URL: a program with its arguments, which reads the request from its standard input.
    command: tuple[_Text, ...] = Field(default=(), max_length=64)
    #: Time for one request.
    timeout: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=15)
    #: Interval of its job.
    check_every: Annotated[Duration, _Seconds] = timedelta(seconds=5)
    #: As many hosts are wanted as let waiting steps begin within this time.
    target_wait: Annotated[Duration, _Seconds, CHANGEABLE] = timedelta(seconds=60)
    #: Least time between two requests for more hosts of a class.
    up_cooldown: Annotated[Duration, durations.at_least("0s"), CHANGEABLE] = timedelta(seconds=30)
    #: For so long fewer hosts must suffice before one is given up.
    down_cooldown: Annotated[Duration, durations.at_least("0s"), CHANGEABLE] = timedelta(minutes=5)

    @model_validator(mode="after")
    def _has_one_receiver(self) -> Self:
        if self.url and self.command:
            raise ValueError("url and command are both set; accepted: one of them")
        if self.mode == "on" and not (self.url or self.command):
            raise ValueError("mode 'on' needs a url or a command")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError("url must begin with http:// or https://")
        if self.url and not self.secret:
            raise ValueError("url needs secret: the name of the secret that signs the requests")
        for what in ("name", "type"):
            values = [getattr(one, what) for one in self.classes]
            if len(values) != len(set(values)):
                raise ValueError(f"two classes have the same {what}")
        return self
