"""
The structure of a MIME message: its parts, decoded, under bounds on their number, depth and size.

The parser of the standard library recurses without a bound, and compares each line with each boundary. Here a
multipart is divided by searching for its boundary, and what is nested too deeply stays one part.
No bytes make `divide` raise; what was wrong is listed. Nothing is unpacked: an archive is an attachment like others.
"""

from __future__ import annotations

import quopri
from collections.abc import Iterator
from dataclasses import dataclass, field

from app.handoffs.mail import headers
from app.handoffs.mail.headers import ContentHeaders, MailHeaders

#: Most parts of a message, levels of multiparts, and defects that are listed.
MAX_PARTS, MAX_DEPTH, MAX_DEFECTS = 200, 10, 20
#: Most characters of a boundary. RFC 2046 allows 70.
_MAX_BOUNDARY = 200


@dataclass(frozen=True, slots=True)
class MailPart:
    """A part that is no multipart."""

    headers: MailHeaders
    content: ContentHeaders
    #: Decoded.
    data: bytes = field(repr=False)
    #: Of the alternatives that it belongs to; None: to none.
    alternative: int | None


@dataclass(frozen=True, slots=True)
class MailStructure:
    """A divided message."""

    headers: MailHeaders
    content: ContentHeaders
    parts: tuple[MailPart, ...]
    #: What was wrong or not read.
    defects: tuple[str, ...]
    #: Whether something was not read.
    is_cut: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    raw: bytes
    depth: int
    alternative: int | None


def divide(raw: bytes) -> MailStructure:
    """Return the parts of a message in their order."""
    top, _, _ = headers.split(raw)
    parts: list[MailPart] = []
    defects: list[str] = []
    pieces, groups, cut = [_Piece(raw, 0, None)], 0, False
    while pieces:
        piece = pieces.pop()
        if len(parts) == MAX_PARTS:
            defects.append(f"there are more than {MAX_PARTS} parts; the others were not read")
            cut = True
            break
        found, body, wrong = headers.split(piece.raw)
        defects += wrong
        cut = cut or any("not read" in one or "were read" in one for one in wrong)
        about = headers.content(found)
        boundary = about.boundary.encode("utf-8", errors="replace")
        is_multipart = about.type.startswith("multipart/")
        if is_multipart and boundary and len(boundary) <= _MAX_BOUNDARY and piece.depth < MAX_DEPTH:
            room = MAX_PARTS - len(parts) - len(pieces) + 1
            inner, closed, more = _divided(body, boundary, room)
            if more:
                defects.append(f"there are more than {MAX_PARTS} parts; the others were not read")
                cut = True
            if inner:
                if not closed:
                    defects.append(f"a {about.type} has no end")
                alternative = piece.alternative
                if about.type == "multipart/alternative":
                    groups += 1
                    alternative = groups
                pieces += [_Piece(one, piece.depth + 1, alternative) for one in reversed(inner)]
                continue
            defects.append(f"a {about.type} has no part")
        elif is_multipart and piece.depth >= MAX_DEPTH:
            defects.append(f"multiparts are nested more than {MAX_DEPTH} deep; what is below is one attachment")
            cut = True
        elif is_multipart:
            defects.append(f"a {about.type} has no boundary that can be used")
        data, whole = _decoded(found.first("content-transfer-encoding").lower(), body)
        if not whole:
            defects.append("the encoding of a part is broken; what could be decoded was read")
        parts.append(MailPart(found, about, data, piece.alternative))
    listed = tuple(dict.fromkeys(defects))[:MAX_DEFECTS]
    return MailStructure(top, headers.content(top), tuple(parts), listed, cut)


def _divided(body: bytes, boundary: bytes, most: int) -> tuple[list[bytes], bool, bool]:
    """Return the parts between boundaries, whether the last boundary ended them, and whether there are more."""
    found: list[bytes] = []
    begin: int | None = None
    for at, after, is_last in _boundaries(body, b"--" + boundary):
        if begin is not None:
            found.append(_without_end(body[begin:at]))
        begin = after
        if is_last:
            return found, True, False
        if len(found) >= most:
            return found, False, True
    if begin is not None and begin < len(body):
        found.append(body[begin:])
    return found, False, False


def _boundaries(body: bytes, line: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield where a boundary begins, where the line after it begins, and whether it is the last one."""
    at = body.find(line)
    while at >= 0:
        end = body.find(b"\n", at)
        end = len(body) if end < 0 else end
        rest = body[at + len(line) : min(end, at + len(line) + 100)].rstrip(b" \t\r")
        if (at == 0 or body[at - 1 : at] == b"\n") and rest in (b"", b"--"):
            yield at, end + 1, rest == b"--"
        at = body.find(line, at + len(line))


def _without_end(part: bytes) -> bytes:
    return part.removesuffix(b"\n").removesuffix(b"\r")


def _decoded(encoding: str, body: bytes) -> tuple[bytes, bool]:
    """Return a content, and whether its encoding was whole."""
    match encoding.partition(";")[0].strip():
        case "base64":
            return headers.from_base64(body)
        case "quoted-printable":
            return quopri.decodestring(body), True
        case "" | "7bit" | "8bit" | "binary":
            return body, True
        case _:
            return body, False
