"""
Image headers: the format and the size of an image, from its first bytes, before anything decodes it.

PNG, JPEG, WebP and GIF are known (https://www.w3.org/TR/png-3/, ITU T.81, RFC 9649, the GIF89a specification). An image
of more pixels than allowed is refused here, so a small file never becomes gigabytes.

Nothing here decodes pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF"]

#: Longest side in pixels, and most times that one side may be longer than the other: models cannot scale more.
MAX_SIDE, MAX_RATIO = 16_384, 100
#: Most segments of a JPEG before its size: an image of a camera has about a dozen.
_MAX_SEGMENTS = 2_000
#: Markers of JPEG that begin a frame, with the size; and those without a length.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image says of itself."""

    format: ImageFormat
    #: In pixels.
    width: int
    height: int


def read(data: bytes) -> ImageHeader:
    """Return the header of an image. Raises ValueError when it is of another format, or incomplete."""
    if not data:
        raise ValueError("the image is empty")
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return ImageHeader("GIF", *_numbers(data, (6, 2, "little"), (8, 2, "little")))
    raise ValueError("the data is no image of a known format; accepted are PNG, JPEG, WebP and GIF")


def require_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ValueError for an image of a size that is not accepted."""
    size = f"the image has {width} by {height} pixels"
    if min(width, height) < 1:
        raise ValueError(f"{size}; each side needs at least 1")
    if width * height > max_pixels:
        raise ValueError(f"{size}, {width * height} in all; at most {max_pixels} are accepted (images.max_pixels)")
    if max(width, height) > MAX_SIDE or max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{size}; accepted are sides up to {MAX_SIDE}, one at most {MAX_RATIO} times the other")


def check(data: bytes, max_bytes: int, max_pixels: int) -> ImageHeader:
    """Return the header of an image that may be decoded. Raises ValueError."""
    if len(data) > max_bytes:
        raise ValueError(f"the image has {len(data)} bytes; at most {max_bytes} are accepted (images.max_bytes)")
    header = read(data)
    require_size(header.width, header.height, max_pixels)
    return header


def _png(data: bytes) -> ImageHeader:
    if data[12:16] != b"IHDR":
        raise ValueError("the PNG image is damaged or incomplete: it does not begin with its header")
    return ImageHeader("PNG", *_numbers(data, (16, 4, "big"), (20, 4, "big")))


def _jpeg(data: bytes) -> ImageHeader:
    at = 2
    for _ in range(_MAX_SEGMENTS):
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] == b"\xff":
            at += 1  # fill bytes
        if len(data) < at + 4 or data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker in _BARE:
            at += 2
            continue
        if marker in _FRAMES:
            height, width = _numbers(data, (at + 5, 2, "big"), (at + 7, 2, "big"))
            return ImageHeader("JPEG", width, height)
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
    raise ValueError("the JPEG image is damaged or incomplete: its size was not found")


def _webp(data: bytes) -> ImageHeader:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = _numbers(data, (24, 3, "little"), (27, 3, "little"))
        return ImageHeader("WEBP", width + 1, height + 1)
    if kind == b"VP8L" and data[20:21] == b"\x2f":
        (bits,) = _numbers(data, (21, 4, "little"))
        return ImageHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = _numbers(data, (26, 2, "little"), (28, 2, "little"))
        return ImageHeader("WEBP", width & 0x3FFF, height & 0x3FFF)
    raise ValueError("the WebP image is damaged or incomplete: its header was not found")


def _numbers(data: bytes, *places: tuple[int, int, Literal["big", "little"]]) -> tuple[int, ...]:
    """Return unsigned numbers at places: offset, bytes, order. Raises ValueError when the data ends before."""
    if any(len(data) < at + size for at, size, _ in places):
        raise ValueError("the image is incomplete: it ends inside its header")
    return tuple(int.from_bytes(data[at : at + size], order) for at, size, order in places)
