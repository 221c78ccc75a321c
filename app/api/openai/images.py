"""
Images of calls: checked before the call is sent, so that a wrong one is an error at once, with its field.

An image that comes as a data URL is stored as a file, and the request then names the file: runs stay small, and a
conversation that sends its images again sends them to the same file. Nothing is fetched here; the pool does that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from app.access.callers import Caller
from app.api import threads
from app.api.services import Services
from app.catalog.model import Model
from app.files import storage
from app.files.file import FilePurpose, parsed_id, shown_id
from app.inference.images import headers, references
from app.inference.images.references import ImageOrigin
from app.inference.openai.chat import ChatRequest
from app.inference.openai.responses.request import ResponsesRequest
from app.kernel.errors import InvalidInput, NotFound, Problem, StepFailure
from app.kernel.sections.http import HttpSettings
from app.kernel.security.egress import EgressPolicy
from app.workflows.http import calls
from app.workflows.http.calls import HttpCall

R = TypeVar("R", ChatRequest, ResponsesRequest)

#: The part of the time for which an image is kept that one stored before must have left.
_LEFT = 2


def has_images(body: ChatRequest | ResponsesRequest) -> bool:
    """Whether the request has an image."""
    if isinstance(body, ChatRequest):
        return body.has_images
    contents = [getattr(item, "content", None) or getattr(item, "output", None) for item in body.input]
    return any(part.image is not None for content in contents if isinstance(content, list) for part in content)


async def accepted(services: Services, caller: Caller, body: R) -> R:
    """
    Return the request with its images stored.

    Raises InvalidInput for an image that is not accepted, NotFound for a file that is not there, FileTooLarge.
    """
    return await threads.run_for_request(_accepted, services, caller, body) if has_images(body) else body


def require_reader(services: Services, model: Model, body: ChatRequest) -> None:
    """Raises InvalidInput when the request has images and the model reads none."""
    if not body.has_images or model.mmproj is not None:
        return
    able = ", ".join(one.name for one in services.catalog.models if one.mmproj is not None)
    message = f"the model {model.name!r} reads no images: its entry in the catalogue has no projector (mmproj)"
    place = body.translated().images[0].place
    raise InvalidInput([Problem(place, message, able or "a model with a projector: docs/vision.md")], "request")


def _accepted(services: Services, caller: Caller, body: R) -> R:
    document = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
    store = partial(_stored, services, caller.namespace_of(caller.labels({})))
    fields = ("messages", "content") if isinstance(body, ChatRequest) else ("input", "content")
    count = 0
    for at, item in enumerate(document[fields[0]]):
        for name in ("content", "output"):
            parts = item.get(name)
            if not isinstance(parts, list):
                continue
            for number, part in enumerate(parts):
                if part.get("type") in ("image_url", "input_image"):
                    count += 1
                    if count > (most := services.settings.images.max_images):
                        problem = Problem(fields[0], f"there are more than {most} images (setting images.max_images)")
                        raise InvalidInput([problem], "request")
                    _accept_part(part, f"{fields[0]}[{at}].{name}[{number}]", store)
    return type(body).model_validate(document)


def _accept_part(part: dict[str, Any], place: str, store: Callable[[str], str]) -> None:
    """Replace the reference of a part. Raises InvalidInput, which names the field."""
    name = "image_url" if part.get("image_url") is not None else "file_id"
    where = f"{place}.{name}"
    try:
        part[name] = store(part[name])
    except ValueError as error:
        raise InvalidInput([Problem(where, str(error))], "request") from None
    except NotFound as error:
        raise NotFound("file", error.name, where=where) from None


def _stored(services: Services, namespace: str, text: str) -> str:
    """Return the reference by which a pool finds the image. Raises ValueError, NotFound, FileTooLarge."""
    settings, reference = services.settings.images, references.parse(text)
    match reference.origin:
        case ImageOrigin.URL:
            _require_allowed(text, services.settings.http)
            return text
        case ImageOrigin.FILE:
            found = storage.get(services.database, parsed_id(text), namespace, text)
            if found.bytes > settings.max_bytes:
                raise ValueError(f"the file has {found.bytes} bytes; at most {settings.max_bytes} are accepted")
            return text
        case ImageOrigin.DATA:
            data = references.decoded(reference, settings.max_bytes)
            header = headers.check(data, settings.max_bytes, settings.max_pixels)
            with services.database.work() as work:
                kept = storage.find_equal(work, namespace, FilePurpose.VISION, data, settings.keep / _LEFT)
                name = f"image.{header.format.lower()}"
                kept = kept or storage.add(
                    work, namespace, data, name, FilePurpose.VISION, settings.keep, services.settings.files
                )
            return shown_id(kept.id)


def _require_allowed(url: str, settings: HttpSettings) -> None:
    """Raises ValueError for a URL whose host may not be called."""
    policy = EgressPolicy.of(settings.allowed_hosts, allow_private=settings.allow_private)
    if not policy.rules:
        raise ValueError("no host may be called: the setting http.allowed_hosts is empty; send the image itself")
    try:
        hop = calls.first_hop(HttpCall(url))
    except StepFailure as failure:
        raise ValueError(failure.message) from None
    if (refusal := policy.refuse_host(hop.scheme, hop.host, hop.port)) is not None:
        raise ValueError(f"{hop} may not be called: {refusal}")
