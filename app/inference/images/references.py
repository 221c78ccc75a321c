"""
Image references: the three ways in which a request names an image.

    data:image/png;base64,…    the image itself
    file-…                     an uploaded file of the same namespace
    https://host/picture.png   an image of another server, which is fetched only when its host is allowed

Nothing here opens a file or a connection.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from enum import StrEnum

#: The form of the id of a file, and its beginning.
_FILE, _FILE_PREFIX = re.compile(r"file-[0-9a-f]{32}", re.ASCII), "file-"
#: Most characters of a URL that is no data URL.
_MAX_URL = 2_000
#: The media types of data URLs.
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
#: By the base64 text of the first bytes, the media type.
_STARTS = {"iVBORw0KGg": "image/png", "/9j/": "image/jpeg", "UklGR": "image/webp", "R0lGOD": "image/gif"}
#: What a request may name, for messages.
ACCEPTED = "a data URL (data:image/png;base64,…), the id of an uploaded file (file-…), or an http(s) URL"
_DATA = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)?(?:;[^,;]{1,100}){0,4}?(;base64)?,", re.IGNORECASE | re.ASCII)


class ImageOrigin(StrEnum):
    """How a reference names its image."""

    DATA = "data"
    FILE = "file"
    URL = "url"


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A reference whose form is valid."""

    origin: ImageOrigin
    #: The base64 text of a data URL, the id of a file, or a URL.
    value: str = field(repr=False)


def parse(text: str) -> ImageReference:
    """Return the reference of a text. Raises ValueError, which says what is accepted. The image is not read."""
    if text[:5].lower() == "data:":
        return _data(text)
    if text.startswith(_FILE_PREFIX):
        if not _FILE.fullmatch(text):
            raise ValueError(f"{text[:60]!r} is no id of a file: file- and 32 hexadecimal digits")
        return ImageReference(ImageOrigin.FILE, text)
    if text[:8].lower().startswith(("http://", "https://")):
        if len(text) > _MAX_URL:
            raise ValueError(f"the URL has {len(text)} characters; at most {_MAX_URL} are accepted")
        return ImageReference(ImageOrigin.URL, text)
    raise ValueError(f"this names no image; accepted: {ACCEPTED}")


def _data(text: str) -> ImageReference:
    found = _DATA.match(text[:600])
    if found is None:
        raise ValueError("the data URL is incomplete; accepted: data:image/png;base64,…")
    media = (found[1] or "").lower()
    if media not in MEDIA_TYPES:
        raise ValueError(f"data of the type {media[:40]!r} is no image here; accepted are {', '.join(MEDIA_TYPES)}")
    if found[2] is None:
        raise ValueError("the data URL is not encoded as base64; accepted: data:image/png;base64,…")
    return ImageReference(ImageOrigin.DATA, text[found.end() :])


def data_url(encoded: str) -> str:
    """Return the data URL of an image that is encoded as base64, by its first bytes. Raises ValueError."""
    for start, media in _STARTS.items():
        if encoded.startswith(start):
            return f"data:{media};base64,{encoded}"
    raise ValueError("this is no image as base64; accepted are PNG, JPEG, WebP and GIF")


def decoded(reference: ImageReference, max_bytes: int) -> bytes:
    """Return the bytes of a data URL. Raises ValueError."""
    if len(reference.value) > -(-max_bytes // 3) * 4:
        raise ValueError(f"the image has more than {max_bytes} bytes (setting images.max_bytes)")
    try:
        return base64.b64decode(reference.value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the data URL is not valid base64") from None
