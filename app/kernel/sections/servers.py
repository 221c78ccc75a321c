"""The sections of the servers: the log, the API, Flower and the broker."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from pydantic import Field, SecretStr

from app.kernel.sections.section import Section
from app.kernel.units.durations import Duration


class LogSettings(Section):
    """The level and the format of the log."""

    #: Lines below this level are dropped.
    level: Literal["debug", "info", "warning", "error"] = "info"
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
    #: Most bytes of a request body; a larger one is refused with 413.
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    #: Most bytes of the inputs, of the output, and of the steps' outputs together, in the answer for a run; longer
    #: values are replaced by references. 0 replaces all.
    max_inline_bytes: int = Field(default=1024 * 1024, ge=0)


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
