"""
The headers of mail, read under bounds: fields, encoded words (RFC 2047), addresses and message ids (RFC 5322).

Each function takes time that grows with the length of its text only, and none raises for any bytes.
"""

from __future__ import annotations

import base64
import binascii
import quopri
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

from app.handoffs.mail import charsets
from app.kernel.security import texts

#: Most bytes of all headers, most of them, and most characters of one.
MAX_BYTES, MAX_HEADERS, MAX_VALUE = 131_072, 400, 8_192
#: Most characters of a parameterised header, such as `Content-Type`.
_MAX_STRUCTURED = 2_000
#: Most addresses of a header, and most message ids.
MAX_ADDRESSES, MAX_IDS = 50, 100
#: Most characters of a name, of an address (RFC 5321), and of a message id.
_MAX_NAME, _MAX_ADDRESS, _MAX_ID = 200, 254, 250

_DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_NO_DIGITS = bytes(set(range(256)) - set(_DIGITS))
_END = re.compile(rb"\r?\n\r?\n|^\r?\n")
_FIELD = re.compile(r"([!-9;-~]{1,100})[ \t]*:(.*)", re.DOTALL)
_WORD = re.compile(r"=\?([A-Za-z0-9_.+:-]{1,40})(?:\*[A-Za-z0-9-]{0,20})?\?([bBqQ])\?([^?]{0,2000})\?=")
_ID = re.compile(rf"<([^<>\s]{{1,{_MAX_ID}}})>")
_ADDRESS = re.compile(r"[^\s<>()\"',;:\\@\[\]]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})")


@dataclass(frozen=True, slots=True)
class MailHeaders:
    """The fields of a message or of a part, in their order."""

    #: Names in lower case, values on one line.
    fields: tuple[tuple[str, str], ...]

    def first(self, name: str) -> str:
        """Return the value of a header, or an empty text."""
        return next((value for key, value in self.fields if key == name), "")

    def all(self, name: str) -> list[str]:
        """Return the values of all headers of a name."""
        return [value for key, value in self.fields if key == name]


@dataclass(frozen=True, slots=True)
class MailAddress:
    """A mailbox."""

    name: str
    #: In the case in which it came; empty when it is none.
    address: str


@dataclass(frozen=True, slots=True)
class ContentHeaders:
    """What the headers of a part say about its content."""

    #: Such as `text/plain`, in lower case.
    type: str
    charset: str
    #: Empty: the part has no boundary that can be used.
    boundary: str
    filename: str
    is_attachment: bool
    #: The parameter `report-type`.
    report: str


def split(data: bytes) -> tuple[MailHeaders, bytes, list[str]]:
    """Return the headers of a message or a part, its body, and what was wrong or not read."""
    found = _END.search(data)
    if found is None:
        block, body = data, b""
    else:
        block, body = data[: found.start()], data[found.end() :]
    defects = []
    if len(block) > MAX_BYTES:
        block = block[:MAX_BYTES]
        defects.append(f"the headers have more than {MAX_BYTES} bytes; the rest of them was not read")
    fields, wrong = _fields(charsets.decoded(block, "")[0])
    if wrong:
        defects.append(f"{wrong} lines of the headers are no headers")
    if len(fields) > MAX_HEADERS:
        defects.append(f"there are {len(fields)} headers; {MAX_HEADERS} were read")
    return MailHeaders(tuple(fields[:MAX_HEADERS])), body, defects


def _fields(block: str) -> tuple[list[tuple[str, str]], int]:
    """Return the unfolded fields, and how many lines are none."""
    found: list[tuple[str, list[str]]] = []
    wrong = 0
    for at, line in enumerate(block.replace("\r\n", "\n").split("\n")):
        if line[:1] in (" ", "\t"):
            if found:
                found[-1][1].append(line)
            else:
                wrong += 1
        elif matched := _FIELD.fullmatch(line):
            found.append((matched[1].lower(), [matched[2]]))
        elif line.strip() and not (at == 0 and line.startswith("From ")):  # the envelope of an mbox file
            wrong += 1
    return [(name, _one_line("".join(parts))) for name, parts in found], wrong


def _one_line(text: str) -> str:
    return " ".join(text[: MAX_VALUE * 2].split())[:MAX_VALUE]


def unencoded(value: str) -> str:
    """Return a value with its encoded words as text."""
    parts: list[str] = []
    run: list[tuple[str, bytes]] = []
    end = 0
    for word in _WORD.finditer(value):
        between = value[end : word.start()]
        if between.strip() or not run:
            parts += [*_texts(run), between]
            run = []
        run.append((word[1].lower(), _decoded_word(word[2].lower(), word[3])))
        end = word.end()
    parts += [*_texts(run), value[end:]]
    return _one_line("".join(parts))


def _texts(run: list[tuple[str, bytes]]) -> Iterator[str]:
    """Decode adjacent words of one charset together: some programs divide a character between two words."""
    at = 0
    while at < len(run):
        charset, data = run[at][0], bytearray()
        while at < len(run) and run[at][0] == charset:
            data += run[at][1]
            at += 1
        yield charsets.decoded(bytes(data), charset)[0]


def _decoded_word(encoding: str, text: str) -> bytes:
    raw = text.encode("ascii", errors="replace")
    if encoding == "q":
        return quopri.decodestring(raw, header=True)
    return from_base64(raw)[0]


def from_base64(data: bytes) -> tuple[bytes, bool]:
    """Return decoded bytes, and whether the text was complete. Other characters are passed over."""
    for padding in (b"", b"=", b"=="):
        try:
            return binascii.a2b_base64(data + padding), not padding
        except binascii.Error:
            continue
    digits = data.translate(None, _NO_DIGITS)
    return base64.b64decode(digits[: len(digits) // 4 * 4]), False


def addresses(value: str) -> list[MailAddress]:
    """Return the mailboxes of a header, at most `MAX_ADDRESSES`."""
    found = []
    for text in _mailboxes(value):
        name, bracket, rest = text.rpartition("<")
        candidate = rest.partition(">")[0] if bracket else text
        matched = _ADDRESS.search(candidate)
        address = matched[0] if matched and len(matched[0]) <= _MAX_ADDRESS else ""
        shown = unencoded(name.strip().strip('"').replace('\\"', '"')) if bracket else ""
        if address or shown:
            found.append(MailAddress(shown[:_MAX_NAME], address))
        if len(found) == MAX_ADDRESSES:
            break
    return found


def _mailboxes(value: str) -> Iterator[str]:
    """Divide a header at its commas, outside quotes and without comments."""
    part: list[str] = []
    quoted, escaped, depth = False, False, 0
    for one in value:
        if escaped:
            escaped = False
        elif one == "\\":
            escaped = True
        elif one == '"' and not depth:
            quoted = not quoted
        elif not quoted and one == "(":
            depth += 1
        elif not quoted and one == ")" and depth:
            depth -= 1
            continue
        elif not quoted and not depth and one in ",;":
            yield "".join(part).strip()
            part = []
            continue
        if not depth:
            part.append(one)
    yield "".join(part).strip()


def message_ids(value: str) -> list[str]:
    """Return the message ids of a header with their brackets, at most `MAX_IDS`: the first one and the last ones."""
    found = [f"<{one}>" for one in _ID.findall(value)]
    return found if len(found) <= MAX_IDS else [found[0], *found[-MAX_IDS + 1 :]]


def content(headers: MailHeaders) -> ContentHeaders:
    """Return what the headers say about a content."""
    message = Message()
    for name in ("content-type", "content-disposition"):
        if value := headers.first(name):
            message[name] = value[:_MAX_STRUCTURED]
    type_ = str(_asked(message, "get_content_type") or "text/plain").lower()
    if type_ == "text/plain" and "content-type" in message and "/" not in message["content-type"][:200]:
        type_ = "application/octet-stream" if "name=" in message["content-type"] else type_
    return ContentHeaders(
        texts.storable(type_, 127),
        str(_asked(message, "get_content_charset") or ""),
        str(_asked(message, "get_boundary") or ""),
        _name(str(_asked(message, "get_filename") or "")),
        _asked(message, "get_content_disposition") == "attachment",
        texts.storable(str(_asked(message, "get_param", "report-type") or "").lower(), 100),
    )


def _asked(message: Message, question: str, *arguments: str) -> object:
    """Ask the parser of the standard library, which raises for some parameters."""
    try:
        found: object = getattr(message, question)(*arguments)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None
    return found


def _name(filename: str) -> str:
    """Return the name of a file without folders and control characters."""
    last = unencoded(filename).replace("\\", "/").rpartition("/")[2]
    plain = "".join(one if one.isprintable() else " " for one in last).strip()
    return "" if plain in (".", "..") else plain[:_MAX_NAME]
