"""
Images of requests: read from where the request names them, checked, and decoded into pixels.

Size and pixels are checked by the first bytes, before the decoder sees an image. The decoder (Pillow) knows four
formats here; of an animation it reads the first picture. An image of another server is fetched like an `http`
step does: only from hosts that are allowed, and never from an address of this machine unless that is allowed, too.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image, ImageOps

from app.files import storage
from app.files.file import parsed_id
from app.inference.images import headers, references
from app.inference.images.references import ImageOrigin
from app.inference.requests import GenerateRequest, ImageInput, Pixels
from app.kernel.database import Database
from app.kernel.errors import FailureReason, NotFound, StepFailure
from app.kernel.sections.http import HttpSettings
from app.kernel.sections.images import ImageSettings
from app.workflows.http.calls import HttpCall
from workers import outbound
from workers.engine import OnStop
from workers.runtime import Runtime

#: Modes of 16 bits for each pixel, which Pillow would clip to 8.
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L"})
#: Transparent parts of an image become white.
_BACKGROUND = (255, 255, 255, 255)


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Reads the images of the requests of one namespace."""

    database: Database
    namespace: str
    settings: ImageSettings
    http: HttpSettings
    #: Registers what stops a fetch.
    on_stop: OnStop

    @staticmethod
    def of(runtime: Runtime, namespace: str, on_stop: OnStop) -> ImageReader:
        """Return the reader of a process for a namespace."""
        return ImageReader(runtime.runs.database, namespace, runtime.settings.images, runtime.settings.http, on_stop)

    def read(self, request: GenerateRequest) -> GenerateRequest:
        """
        Return the request with its images decoded.

        Raises StepFailure, which names the field, and CancelledError when it was stopped.
        """
        if not request.images:
            return request
        if len(request.images) > self.settings.max_images:
            most = f"at most {self.settings.max_images} are accepted (setting images.max_images)"
            raise _invalid(f"the request has {len(request.images)} images; {most}")
        known: dict[str, Pixels] = {}
        messages = []
        for message in request.messages:
            images = tuple(replace(image, pixels=self._pixels(image, known)) for image in message.images)
            messages.append(replace(message, images=images) if images else message)
        return replace(request, messages=tuple(messages))

    def _pixels(self, image: ImageInput, known: dict[str, Pixels]) -> Pixels:
        if image.pixels is not None:
            return image.pixels
        if image.reference not in known:
            try:
                known[image.reference] = decode(self._bytes(image), self.settings)
            except ValueError as error:
                raise _invalid(f"{image.place}: {error}") from None
            except StepFailure as failure:
                message = f"{image.place}: {failure.message}"
                raise StepFailure(failure.reason, message, retry_after=failure.retry_after) from None
        return known[image.reference]

    def _bytes(self, image: ImageInput) -> bytes:
        reference, settings = references.parse(image.reference), self.settings
        match reference.origin:
            case ImageOrigin.DATA:
                return references.decoded(reference, settings.max_bytes)
            case ImageOrigin.FILE:
                try:
                    found = storage.get(self.database, parsed_id(image.reference), self.namespace, image.reference)
                    return storage.whole(self.database, found.id, settings.max_bytes)
                except NotFound:
                    raise ValueError(f"there is no file {image.reference}; it may have expired") from None
                except storage.FileTooLarge:
                    raise ValueError(f"the file has more than {settings.max_bytes} bytes (images.max_bytes)") from None
            case ImageOrigin.URL:
                call = HttpCall(
                    image.reference,
                    method="GET",
                    headers={"accept": ", ".join(references.MEDIA_TYPES)},
                    timeout=settings.fetch_timeout,
                    max_bytes=settings.max_bytes,
                    follow_redirects=True,
                )
                return outbound.fetch(call, settings=self.http, on_stop=self.on_stop)


def decode(data: bytes, settings: ImageSettings) -> Pixels:
    """Return the pixels of an image, upright and opaque. Raises ValueError for one that is not accepted."""
    header = headers.check(data, settings.max_bytes, settings.max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=[header.format]) as opened:
            # The parts of an animation can be larger than its header says.
            headers.require_size(*opened.size, settings.max_pixels)
            opened.load()
            headers.require_size(*opened.size, settings.max_pixels)
            picture: Image.Image = ImageOps.exif_transpose(opened)
            if picture.mode in _DEEP_MODES:
                picture = picture.convert("I").point(lambda value: value / 256).convert("L")
            if picture.mode != "RGB":
                colours = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", colours.size, _BACKGROUND), colours).convert("RGB")
            return Pixels(picture.width, picture.height, picture.tobytes())
    except MemoryError:
        raise
    except ValueError as error:
        if str(error).startswith("the image has"):
            raise
        raise _undecodable(header.format, error) from None
    except Exception as error:  # noqa: BLE001 (a decoder of foreign data: whatever it raises, the image is not usable)
        raise _undecodable(header.format, error) from None


def none_stops(_: Callable[[], None]) -> None:
    """What registers a stop where nothing stops."""


def _undecodable(format_: str, error: Exception) -> ValueError:
    return ValueError(f"the {format_} image cannot be decoded; it is damaged or incomplete ({str(error)[:120]})")


def _invalid(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)


__all__ = ["ImageReader", "decode", "none_stops"]
