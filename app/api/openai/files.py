"""The resource `files` in OpenAI's form: inputs of batches, their results, and data of users."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import quote
from uuid import UUID

from fastapi import Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import threads
from app.api.callers import InjectedCaller, requires
from app.api.openai import errors, uploads
from app.api.openai.errors import OpenAIRoute
from app.api.openai.uploads import MULTIPART, Upload
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.files import storage
from app.files.file import FilePurpose, StoredFile, parsed_id, shown_id
from app.files.storage import FileWriter
from app.inference.batches import service as batches
from app.kernel.database import Database
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.sections.files import FileSettings

#: The path of the one endpoint that accepts forms.
PATH = "/v1/files"

router = ApiRouter(
    prefix=PATH,
    tags=["openai"],
    dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)],
    route_class=OpenAIRoute,
)

#: Purposes that a client may give.
_PURPOSES = (FilePurpose.BATCH, FilePurpose.VISION, FilePurpose.USER_DATA)
#: Bounds of `expires_after[seconds]`, as in OpenAI's API.
_SHORTEST, _LONGEST = 3_600, 2_592_000
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [purpose.value for purpose in _PURPOSES]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": _SHORTEST, "maximum": _LONGEST},
                    },
                }
            }
        },
    }
}


class FileObjectOut(BaseModel):
    """A file. `sha256` is Arriero's."""

    id: str = Field(examples=["file-0199a3c2d6f47a0b8c1d2e3f4a5b6c7d"])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="seconds since 1970")
    expires_at: int | None = Field(description="when it is removed; null for never")
    filename: str
    purpose: FilePurpose
    status: Literal["processed"] = "processed"
    sha256: str = Field(description="of the content")


class FileListOut(BaseModel):
    """A part of the list of files."""

    object: Literal["list"] = "list"
    data: list[FileObjectOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeletedOut(BaseModel):
    """A file that was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def instant(value: datetime | None) -> int | None:
    """Return an instant as seconds since 1970."""
    return None if value is None else int(value.timestamp())


def out(file: StoredFile) -> FileObjectOut:
    """Return a file in OpenAI's form."""
    return FileObjectOut(
        id=shown_id(file.id),
        bytes=file.bytes,
        created_at=int(file.created_at.timestamp()),
        expires_at=instant(file.expires_at),
        filename=file.filename,
        purpose=FilePurpose(file.purpose),
        sha256=file.sha256,
    )


@router.post(
    "",
    summary="Upload a file",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=errors.documented(400, 409, 413, 415, 503),
    openapi_extra=_FORM,
)
async def upload(request: Request, services: InjectedServices, caller: InjectedCaller) -> FileObjectOut:
    """
    Store a file: the requests of a batch (JSON Lines, purpose `batch`), an image (`vision`), or other (`user_data`).

    A file with the purpose `batch` expires after the setting `files.keep`, unless `expires_after` says otherwise.
    """
    settings, namespace = services.settings.files, caller.namespace_of({})
    received = await uploads.receive(request, partial(FileWriter, services.database, namespace, settings))
    try:
        purpose, keep = _purpose(received), _keep(received, settings)
        return out(await threads.run_for_request(received.writer.finish, received.filename or "file", purpose, keep))
    except BaseException:
        await uploads.discard(received.writer)
        raise


@router.get("", summary="Files", responses=errors.documented(400, 404, 503))
def page(
    services: InjectedServices,
    caller: InjectedCaller,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    after: Annotated[str | None, Query(description="the id of the last file of the part before")] = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: FilePurpose | None = None,
) -> FileListOut:
    """The files, the newest first."""
    last = None
    if after is not None and (last := parsed_id(after)) is None:
        raise NotFound("file", after)
    found = storage.page(
        services.database,
        caller.namespace,
        purpose=None if purpose is None else purpose.value,
        after=last,
        limit=limit,
        newest_first=order == "desc",
    )
    data = [out(file) for file in found.files]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return FileListOut(data=data, first_id=first_id, last_id=last_id, has_more=found.has_more)


@router.get("/{file_id}", summary="A file", responses=errors.documented(400, 404, 503))
def get(file_id: str, services: InjectedServices, caller: InjectedCaller) -> FileObjectOut:
    """A file, without its content."""
    return out(storage.get(services.database, parsed_id(file_id), caller.namespace, file_id))


@router.get(
    "/{file_id}/content",
    summary="The content of a file",
    response_class=StreamingResponse,
    responses={
        200: {"description": "The content", "content": {"application/octet-stream": {}}},
        **errors.documented(400, 404, 503),
    },
)
async def content(file_id: str, services: InjectedServices, caller: InjectedCaller) -> StreamingResponse:
    """The content of a file, as it was uploaded."""
    id_ = parsed_id(file_id)
    file = await threads.run_for_request(storage.get, services.database, id_, caller.namespace, file_id)
    headers = {
        "Content-Length": str(file.bytes),
        # A browser must save it, and not show it as a page of this server.
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
        "ETag": f'"{file.sha256}"',
    }
    parts = _parts(services.database, file.id)
    return StreamingResponse(parts, media_type="application/octet-stream", headers=headers)


@router.delete(
    "/{file_id}",
    summary="Delete a file",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=errors.documented(400, 404, 409, 503),
)
def delete(file_id: str, services: InjectedServices, caller: InjectedCaller) -> FileDeletedOut:
    """Delete a file with its content. The input of a batch that has not ended cannot be deleted."""
    found = storage.get(services.database, parsed_id(file_id), caller.namespace, file_id)
    storage.remove(services.database, found.id, lambda work: batches.require_unused(work, found.id))
    return FileDeletedOut(id=file_id)


async def _parts(database: Database, file_id: UUID) -> AsyncIterator[bytes]:
    number = 0
    while data := await threads.run_for_stream(storage.read, database, file_id, number):
        yield data
        number += 1


def _purpose(received: Upload) -> str:
    """Raises InvalidInput."""
    unknown = [name for name in received.fields if name not in _FIELDS]
    if unknown:
        problem = Problem(unknown[0][:100], "there is no such field here", ", ".join(_FIELDS))
        raise InvalidInput([problem], "request")
    given = received.fields.get("purpose")
    if given not in _PURPOSES:
        wrong = "the field is missing" if given is None else f"{given[:100]!r} is not supported"
        raise InvalidInput([Problem("purpose", wrong, " or ".join(_PURPOSES))], "request")
    return given


def _keep(received: Upload, settings: FileSettings) -> timedelta | None:
    """For how long a file is kept. Raises InvalidInput."""
    anchor = received.fields.get("expires_after[anchor]")
    seconds = received.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return settings.keep if received.fields["purpose"] == FilePurpose.BATCH else None
    if anchor != "created_at":
        problem = Problem("expires_after.anchor", "the file can expire after its creation only", "created_at")
        raise InvalidInput([problem], "request")
    number = int(seconds) if seconds is not None and seconds.isascii() and seconds.isdigit() else 0
    if len(seconds or "") > 10 or not _SHORTEST <= number <= _LONGEST:
        problem = Problem("expires_after.seconds", f"{(seconds or '')[:20]!r} is no time", f"{_SHORTEST} to {_LONGEST}")
        raise InvalidInput([problem], "request")
    return timedelta(seconds=number)
