"""The text of a PDF that came with a mail. It runs in a process of its own, with bounded memory and time."""

from __future__ import annotations

from app.real_estate import document_text


def pdf_text(pdf: str) -> str:
    """Return the text of a PDF in base64, a form feed between pages; empty for scans. Raises InvalidInput."""
    return "\f".join("\n".join(page) for page in document_text.of_pdf(pdf).pages)
