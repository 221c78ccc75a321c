"""Images of requests: read from files, data URLs and allowed hosts, and decoded; a refusal names its field."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler

import pytest
from PIL import Image

from app.files import storage
from app.files.file import FilePurpose, shown_id
from app.inference.requests import ChatMessage, GenerateRequest, ImageInput, Pixels
from app.kernel.database import Database
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.files import FileSettings
from app.kernel.sections.http import HttpSettings
from app.kernel.sections.images import ImageSettings
from tests.workers.test_outbound import Server
from workers import images
from workers.images import ImageReader

PLACE = "messages[1].content[0].image_url"
SMALL = ImageSettings(max_images=3, max_bytes=100_000, max_pixels=40_000)


def encoded(format_: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 20), **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, **({"color": (250, 0, 0)} if mode == "RGB" else {})).save(out, format_, **options)
    return out.getvalue()


def data_url(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def request(*named: str) -> GenerateRequest:
    found = tuple(ImageInput(0, reference, PLACE) for reference in named)
    return GenerateRequest((ChatMessage("system", "s"), ChatMessage("user", "What?", images=found)))


@pytest.fixture
def reader(database: Database) -> ImageReader:
    return ImageReader(database, "default", SMALL, HttpSettings(), images.none_stops)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def pixels(found: GenerateRequest) -> list[Pixels | None]:
    return [image.pixels for image in found.images]


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF"])
def test_each_format_becomes_the_same_pixels(reader: ImageReader, format_: str) -> None:
    (found,) = pixels(reader.read(request(data_url(encoded(format_), f"image/{format_.lower()}"))))
    assert found is not None
    assert (found.width, found.height, len(found.data)) == (40, 20, 2400)
    assert all(abs(a - b) < 12 for a, b in zip(found.data[:3], (250, 0, 0), strict=True))


def test_transparent_grey_and_deep_images_are_converted(reader: ImageReader) -> None:
    clear, grey = encoded(mode="RGBA"), encoded(mode="L")
    deep = io.BytesIO()
    Image.frombytes("I;16", (40, 20), struct.pack("<H", 128 * 256) * 800).save(deep, "PNG")
    found = pixels(reader.read(request(*map(data_url, (clear, grey, deep.getvalue())))))
    assert [one.data[:3] for one in found if one is not None] == [b"\xff" * 3, b"\0" * 3, b"\x80" * 3]


def test_a_turned_photograph_is_upright(reader: ImageReader) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (found,) = pixels(reader.read(request(data_url(encoded("JPEG", exif=exif), "image/jpeg"))))
    assert found is not None
    assert (found.width, found.height) == (20, 40)


def test_of_an_animation_the_first_picture_is_read(reader: ImageReader) -> None:
    out = io.BytesIO()
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 255, 0))
    first.save(out, "GIF", save_all=True, append_images=[second] * 50)
    (found,) = pixels(reader.read(request(data_url(out.getvalue(), "image/gif"))))
    assert found is not None
    assert found.data[:3] == b"\xff\0\0"


def bombs() -> Iterator[tuple[str, bytes, str]]:
    png = bytearray(encoded())
    png[16:24] = struct.pack(">II", 50_000, 50_000)
    yield "png-header", bytes(png), "50000 by 50000 pixels"
    yield "real", encoded(size=(300, 200)), "300 by 200 pixels, 60000 in all; at most 40000"
    gif = bytearray(encoded("GIF", size=(300, 190)))
    gif[6:10] = struct.pack("<HH", 10, 10)  # the canvas is small, the picture is not
    yield "gif-frame", bytes(gif), "300 by 190 pixels, 57000 in all"
    yield (
        "truncated",
        encoded("JPEG", size=(190, 190))[:-400],
        "the JPEG image cannot be decoded; it is damaged or incomp",
    )
    broken = bytearray(encoded("PNG"))
    broken[45:60] = bytes(15)
    yield "damaged", bytes(broken), "the PNG image cannot be decoded"
    yield "bytes", encoded("BMP"), "no image of a known format"
    yield "empty", b"", "the image is empty"
    yield "long", encoded() + bytes(200_000), "more than 100000 bytes"


@pytest.mark.parametrize(("data", "wrong"), [pytest.param(data, wrong, id=id_) for id_, data, wrong in bombs()])
def test_what_cannot_be_decoded_names_its_field(reader: ImageReader, data: bytes, wrong: str) -> None:
    with pytest.raises(StepFailure, match=wrong) as caught:
        reader.read(request(data_url(data)))
    assert caught.value.reason is FailureReason.INVALID_REQUEST
    assert caught.value.message.startswith(f"{PLACE}: ")


def test_files_of_the_namespace_are_read_and_no_others(reader: ImageReader, database: Database) -> None:
    ids = []
    for namespace in ("default", "other"):
        with database.work() as work:
            kept = storage.add(
                work, namespace, encoded(), "a.png", FilePurpose.VISION, timedelta(days=1), FileSettings()
            )
        ids.append(shown_id(kept.id))
    first, again = pixels(reader.read(request(ids[0], ids[0])))
    assert first is again, "it was read once"
    for gone in (ids[1], "file-" + "0" * 32):
        with pytest.raises(StepFailure, match=f"^{PLACE.replace('[', '.').replace(']', '.')}: there is no file file-"):
            reader.read(request(gone))


def test_too_many_images_are_refused(reader: ImageReader) -> None:
    with pytest.raises(StepFailure, match="4 images; at most 3"):
        reader.read(request(*[data_url(encoded())] * 4))


def test_nothing_is_fetched_from_a_host_that_is_not_allowed(reader: ImageReader, server: Server) -> None:
    url = f"{server.url}/a.png"
    with pytest.raises(StepFailure, match=r"http\.allowed_hosts") as caught:
        reader.read(request(url))
    assert caught.value.reason is FailureReason.HTTP_REFUSED
    assert caught.value.message.startswith(f"{PLACE}: ")
    host = f"127.0.0.1:{server.port}"
    listed = ImageReader(reader.database, "default", SMALL, HttpSettings(allowed_hosts=(host,)), images.none_stops)
    with pytest.raises(StepFailure, match="may not be called"):
        listed.read(request(url))  # an address of this machine
    assert not server.seen


def test_an_image_of_an_allowed_host_is_fetched(reader: ImageReader, server: Server) -> None:
    def serve(body: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
        def route(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", "image/png")
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        return route

    server.routes |= {"/a.png": serve(encoded()), "/long": serve(bytes(200_000)), "/page": serve(b"<html>")}
    allowed = HttpSettings(allowed_hosts=(f"127.0.0.1:{server.port}",), allow_private=True)
    fetching = ImageReader(reader.database, "default", SMALL, allowed, images.none_stops)
    (found,) = pixels(fetching.read(request(f"{server.url}/a.png")))
    assert found is not None
    assert found.width == 40
    with pytest.raises(StepFailure, match="longer than max_bytes"):
        fetching.read(request(f"{server.url}/long"))
    with pytest.raises(StepFailure, match="no image of a known format"):
        fetching.read(request(f"{server.url}/page"))
