"""What the first bytes of an image say, and what is refused before anything decodes it."""

from __future__ import annotations

import base64
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from app.inference.images import headers, references
from app.inference.images.references import ImageOrigin

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def encoded(format_: str, width: int = 37, height: int = 23, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 60)).save(out, format_, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "format_"),
    [
        *((encoded(format_), format_) for format_ in FORMATS),
        (encoded("WEBP", lossless=True), "WEBP"),
        (encoded("WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"), "WEBP"),
        (encoded("JPEG", progressive=True), "JPEG"),
        (encoded("JPEG", exif=b"Exif\0\0" + b"x" * 60_000), "JPEG"),
    ],
)
def test_the_size_is_that_of_the_decoder(data: bytes, format_: str) -> None:
    found = headers.check(data, 1_000_000, 1_000_000)
    assert (found.format, found.width, found.height) == (format_, 37, 23)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_truncated_header_is_no_image(format_: str) -> None:
    data = encoded(format_)
    for length in (0, 1, 7, 9):
        with pytest.raises(ValueError, match="image"):
            headers.read(data[:length])


def test_a_small_file_that_claims_many_pixels_is_refused() -> None:
    bomb = bytearray(encoded("PNG"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    with pytest.raises(ValueError, match="60000 by 60000 pixels, 3600000000 in all; at most 1000000 are accepted"):
        headers.check(bytes(bomb), 1_000_000, 1_000_000)
    with pytest.raises(ValueError, match="one at most 100 times the other"):
        headers.check(encoded("PNG", 1_000, 5), 1_000_000, 1_000_000)
    with pytest.raises(ValueError, match=r"images\.max_bytes"):
        headers.check(bytes(bomb), 50, 1_000_000)


def test_other_formats_are_refused() -> None:
    for data in (encoded("BMP"), encoded("TIFF"), b"<svg/>", b"%PDF-1.7", b"GIF88a" + bytes(20)):
        with pytest.raises(ValueError, match="accepted are PNG, JPEG, WebP and GIF"):
            headers.read(data)


@given(
    some.sampled_from([encoded(format_)[:64] for format_ in FORMATS]), some.binary(max_size=80), some.integers(0, 64)
)
def test_any_bytes_have_a_header_or_are_refused(start: bytes, rest: bytes, at: int) -> None:
    """Nothing but a ValueError, and in a time that does not depend on the numbers in the data."""
    try:
        found = headers.read(start[:at] + rest)
    except ValueError:
        return
    assert found.width >= 0
    assert found.height >= 0


def test_references_are_one_of_three_kinds() -> None:
    data = "data:image/png;base64," + base64.b64encode(b"abc").decode()
    assert references.decoded(references.parse(data), 100) == b"abc"
    assert references.parse("file-" + "0" * 32).origin is ImageOrigin.FILE
    assert references.parse("https://example.com/a.png").origin is ImageOrigin.URL
    for text, wrong in (
        ("", "names no image"),
        ("file:///etc/passwd", "names no image"),
        ("/etc/passwd", "names no image"),
        ("file-../../x", "no id of a file"),
        ("data:image/svg+xml;base64,AAAA", "accepted are image/png"),
        ("data:text/html;base64,AAAA", "accepted are image/png"),
        ("data:image/png,AAAA", "not encoded as base64"),
        ("data:" + "x" * 5_000, "incomplete"),
        ("https://example.com/" + "a" * 3_000, "at most 2000"),
    ):
        with pytest.raises(ValueError, match=wrong):
            references.parse(text)
    with pytest.raises(ValueError, match="not valid base64"):
        references.decoded(references.parse("data:image/png;base64,A*A="), 100)
    with pytest.raises(ValueError, match="more than 2 bytes"):
        references.decoded(references.parse("data:image/png;base64,AAAAAAAA"), 2)
