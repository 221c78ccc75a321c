"""The section of images in requests."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class ImageSettings(Section):
    """Images in requests. Their hosts are those of `http.allowed_hosts`."""

    #: Most images of a request.
    max_images: Annotated[int, CHANGEABLE] = Field(default=16, ge=1, le=256)
    #: Most bytes of an image, as a file.
    max_bytes: Annotated[int, CHANGEABLE] = Field(default=10 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024)
    #: Most pixels of an image, which is checked before it is decoded. A decoded one has three bytes for each.
    max_pixels: Annotated[int, CHANGEABLE] = Field(default=16 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024)
    #: Time for fetching an image of another server.
    fetch_timeout: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=20)
    #: Retention of images that came as data URLs. A run, a response or a conversation refers to them.
    keep: Annotated[Duration, durations.at_least("1h")] = timedelta(days=30)
