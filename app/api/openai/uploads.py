"""
Uploads: `multipart/form-data` with one file and a few short fields, stored as it arrives.

At no time more than a few parts of the file are in memory. Whatever goes wrong, nothing of the file stays.
The fields may come before or after the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from anyio import CancelScope
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api import threads
from app.api.bodies import UnsupportedMediaType
from app.files.storage import FileWriter
from app.kernel import log
from app.kernel.errors import ArrieroError, InvalidInput, Problem
from app.kernel.security import texts

_log = log.get(__name__)

#: The media type of an upload.
MULTIPART = "multipart/form-data"
#: Bytes of an upload beside its file: fields, headers of parts, boundaries.
OVERHEAD_BYTES = 64 * 1024
#: Most parts, most bytes of a field and most characters of a file name.
_MAX_PARTS, _MAX_FIELD, _MAX_NAME = 16, 4096, 255
#: Bytes of the file that are collected before a thread stores them.
_COLLECTED = 1024 * 1024


@dataclass(slots=True)
class Upload:
    """What was sent, with the file in `writer`, which the caller finishes or discards."""

    writer: FileWriter
    filename: str
    fields: Mapping[str, str]


@dataclass(slots=True)
class _Part:
    """A part of the form."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    #: Of the part that is the file.
    filename: str | None = None
    data: bytearray = field(default_factory=bytearray)


class _Form:
    """The parser of a form. The data of the file collects in `collected`."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.collected = bytearray()
        self.is_complete = False
        self._part = _Part()
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_end": self._complete,
            },
        )

    def feed(self, data: bytes) -> None:
        """Parse more of the body. Raises InvalidInput."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _invalid("", f"the form cannot be parsed: {error}") from None

    def finish(self) -> str:
        """Return the name of the file. Raises InvalidInput when the form is not complete."""
        if not self.is_complete:
            raise _invalid("", "the form ends before its last boundary")
        if self.filename is None:
            raise _invalid("file", "the form has no file", "a part named 'file'")
        return self.filename

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise _invalid("", f"the form has more than {_MAX_PARTS} parts")
        self._part = _Part()

    def _end_header(self) -> None:
        name, value = self._header
        self._part.headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _end_headers(self) -> None:
        part = self._part
        _, options = parse_options_header(part.headers.get(b"content-disposition", b""))
        part.name = options.get(b"name", b"").decode("utf-8", "replace")
        if part.name != "file":
            return
        if self.filename is not None:
            raise _invalid("file", "the form has two files", "one file")
        named = options.get(b"filename", b"").decode("utf-8", "replace")
        part.filename = self.filename = texts.printable(named.replace("\\", "/").rpartition("/")[2], _MAX_NAME)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.filename is not None:
            self.collected += data[start:end]
            return
        self._part.data += data[start:end]
        if len(self._part.data) > _MAX_FIELD:
            raise _invalid(self._part.name[:100], f"the field is longer than {_MAX_FIELD} bytes")

    def _end(self) -> None:
        if self._part.filename is not None:
            return
        try:
            value = self._part.data.decode("utf-8")
        except UnicodeDecodeError:
            raise _invalid(self._part.name, "the field is not UTF-8") from None
        if self._part.name in self.fields:
            raise _invalid(self._part.name[:100], "the field is sent twice")
        self.fields[self._part.name] = value

    def _complete(self) -> None:
        self.is_complete = True


async def receive(request: Request, begin: Callable[[], FileWriter]) -> Upload:
    """
    Receive the form of a request. `begin` returns a writer for its file.

    Raises InvalidInput, UnsupportedMediaType, what writing the file raises, and ClientDisconnect.
    """
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if media_type != MULTIPART.encode() or not 1 <= len(boundary) <= 200:
        shown = texts.printable(request.headers.get("content-type", ""), 100)
        problem = Problem("Content-Type", f"{shown!r} is not supported", f"{MULTIPART} with a boundary")
        raise UnsupportedMediaType([problem])
    form = _Form(boundary)
    writer = await threads.run_for_request(begin)
    try:
        async for data in request.stream():
            form.feed(data)
            if len(form.collected) >= _COLLECTED:
                await threads.run_for_request(writer.write, bytes(form.collected))
                form.collected.clear()
        filename = form.finish()
        await threads.run_for_request(writer.write, bytes(form.collected))
    except BaseException:
        await discard(writer)
        raise
    return Upload(writer, filename, form.fields)


async def discard(writer: FileWriter) -> None:
    """Remove what was written of a file, also when the request was given up."""
    with CancelScope(shield=True):
        try:
            await threads.run_for_request(writer.discard)
        except ArrieroError as error:
            # The job that removes expired files does it.
            _log.warning("upload_not_discarded", error=str(error))


def _invalid(where: str, message: str, accepted: str = "") -> InvalidInput:
    return InvalidInput([Problem(where, message, accepted)], "request")
