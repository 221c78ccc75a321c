"""
The text of a document: lines of pages, from a PDF or from plain text.

A PDF is an attacker's: its bytes, pages and characters are bounded, and it is read in a process with bounded memory and
time. Nothing in it is executed or fetched. Pages without text (scans) are counted: nothing here reads pictures.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any

from app.real_estate import table

#: Most bytes of a PDF, pages that are read, and characters of all of them and of a line.
MAX_BYTES, MAX_PAGES, MAX_TEXT, MAX_LINE = 16 << 20, 60, 400_000, 600


@dataclass(frozen=True, slots=True)
class DocumentText:
    """The lines of the pages of a document."""

    pages: tuple[tuple[str, ...], ...]
    #: Pages without any text.
    empty: int
    #: Whether there was more than is read.
    cut: bool


def of_text(text: str) -> DocumentText:
    """Return the lines of a text; a form feed begins a page."""
    return _bounded([page.splitlines() for page in text[: MAX_TEXT + 1].split("\f")], cut=len(text) > MAX_TEXT)


def of_pdf(encoded: str) -> DocumentText:
    """Return the lines of a PDF in base64. Raises InvalidInput."""
    if len(encoded) > MAX_BYTES * 4 // 3 + 4:
        raise table.refused("pdf", "the file is too large", f"at most {MAX_BYTES >> 20} MiB")
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise table.refused("pdf", "it is no base64", "the bytes of a PDF in base64") from None
    if b"%PDF-" not in content[:1_024]:
        raise table.refused("pdf", "the file is no PDF", "a file that begins with %PDF-")
    # Whoever reads plain text needs no parser of PDF.
    from pypdf import PdfReader

    try:
        reader = PdfReader(io.BytesIO(content), strict=False)
        locked = reader.is_encrypted and not reader.decrypt("")
        count = 0 if locked else len(reader.pages)
        pages = [reader.pages[i].extract_text().splitlines() for i in range(min(count, MAX_PAGES))]
    except RecursionError:
        raise table.refused("pdf", "the file is nested too deeply", "a PDF") from None
    except Exception as error:  # noqa: BLE001 a broken PDF raises whatever its parser meets
        raise table.refused("pdf", f"the file cannot be read: {type(error).__name__}: {error}"[:300], "a PDF") from None
    if locked:
        raise table.refused("pdf", "the file is encrypted", "a file without a password")
    return _bounded(pages, cut=count > MAX_PAGES)


def _bounded(pages: list[list[str]], *, cut: bool) -> DocumentText:
    left, found = MAX_TEXT, []
    for page in pages[:MAX_PAGES]:
        lines = []
        for line in page:
            plain = " ".join("".join(one if one.isprintable() else " " for one in line[:MAX_LINE]).split())
            if plain and left >= len(plain):
                lines.append(plain)
                left -= len(plain)
            elif plain:
                cut = True
        found.append(tuple(lines))
    return DocumentText(tuple(found), sum(not page for page in found), cut or len(pages) > MAX_PAGES)


def as_json(document: DocumentText) -> dict[str, Any]:
    """Return a document as plain data."""
    return {"pages": [list(page) for page in document.pages], "empty_pages": document.empty, "cut": document.cut}
