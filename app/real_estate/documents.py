"""
Documents: the fields of leases, deeds and inspection reports, each with its quote, page and confidence.

Code finds the lines that may have a field, by its labels; a model reads the value from them.
Code accepts only a value that stands in those lines and has the field's type.
The confidence says how the value was found; a doubt is for a person.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field

from app.real_estate import document_text, table

DocumentKind = Literal["lease", "deed", "inspection"]
FieldType = Literal["money", "date", "name", "text"]

#: Confidence below which a person is asked, unless the caller says otherwise.
DOUBT = 0.8
#: Lines that are shown to the model for a field.
_LINES = 4
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MONTH_NAMES = "|".join(f"{name}|{name[:3]}" for name in _MONTHS)
_DATES = re.compile(
    r"\b(\d{4})-(\d{1,2})-(\d{1,2})\b"
    rf"|\b({_MONTH_NAMES})\.? (\d{{1,2}}),? (\d{{4}})\b|\b(\d{{1,2}}) ({_MONTH_NAMES})\.? (\d{{4}})\b"
    r"|\b(\d{1,2})/(\d{1,2})/(\d{4})\b",
    re.IGNORECASE,
)
_MONEY = re.compile(
    r"(?:\$|USD|EUR|€|£|GBP) ?(\d{1,3}(?:,\d{3})+(?:\.\d{2})?|\d{1,10}(?:\.\d{2})?)(?![\d,])"
    r"|(?<![\w.,])(\d{1,3}(?:,\d{3})+(?:\.\d{2})?|\d{1,10}(?:\.\d{2})?) ?(?:dollars|USD|EUR|€|£|GBP)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class DocumentField:
    """A field of a kind of document."""

    name: str
    type: FieldType
    question: str
    #: Words that stand before the value, in lower case; the first ones say most.
    labels: tuple[str, ...]


def _field(name: str, type_: FieldType, question: str, *labels: str) -> DocumentField:
    return DocumentField(name, type_, question, labels)


FIELDS: Mapping[DocumentKind, tuple[DocumentField, ...]] = {
    "lease": (
        _field("landlord", "name", "Who is the landlord?", "landlord", "lessor"),
        _field("tenant", "name", "Who is the tenant?", "tenant", "lessee"),
        _field("premises", "text", "What is the address?", "premises", "address", "located at"),
        _field("rent", "money", "What is the rent?", "monthly rent", "rent"),
        _field("deposit", "money", "What is the deposit?", "security deposit", "deposit"),
        _field("start", "date", "When does the lease begin?", "commencement", "begins on", "start"),
        _field("end", "date", "When does the lease end?", "expiration", "ends on", "end date"),
    ),
    "deed": (
        _field("grantor", "name", "Who is the grantor?", "grantor", "seller"),
        _field("grantee", "name", "Who is the grantee?", "grantee", "buyer"),
        _field("parcel", "text", "What is the parcel number?", "parcel number", "parcel", "apn"),
        _field("consideration", "money", "What is the price?", "consideration", "sum of", "purchase price"),
        _field("date", "date", "When was it signed?", "dated", "executed on", "date"),
    ),
    "inspection": (
        _field("inspector", "name", "Who is the inspector?", "inspector", "inspected by"),
        _field("address", "text", "What is the address?", "property address", "address", "property"),
        _field("date", "date", "When was the inspection?", "date of inspection", "inspection date", "inspected on"),
        _field("roof", "text", "What is the condition of the roof?", "roof"),
        _field("foundation", "text", "What is the condition of the foundation?", "foundation"),
        _field("repair_cost", "money", "What do the repairs cost?", "estimated repairs", "repair", "cost"),
    ),
}
_KIND_WORDS: Mapping[DocumentKind, tuple[str, ...]] = {
    "lease": ("lease", "landlord", "tenant", "rent", "lessee", "premises"),
    "deed": ("deed", "grantor", "grantee", "convey", "parcel", "consideration"),
    "inspection": ("inspection", "inspector", "roof", "foundation", "repairs", "condition"),
}


def read_document(pdf: str = "", text: str = "", kind: DocumentKind | Literal["auto"] = "auto") -> dict[str, Any]:
    """
    Return the kind of a document, its pages, and for each field the lines that may have it. Raises InvalidInput.

    The document is a PDF in base64, or a text.
    """
    if bool(pdf) == bool(text):
        raise table.refused("pdf", "the document is missing or there twice", "either pdf or text")
    document = document_text.of_pdf(pdf) if pdf else document_text.of_text(text)
    if not any(document.pages):
        raise table.refused("pdf" if pdf else "text", "it has no text; scans are not read", "a document with text")
    words = " ".join(line for page in document.pages for line in page).lower()
    counts = {one: sum(words.count(word) for word in some) for one, some in _KIND_WORDS.items()}
    ranked = sorted(counts, key=lambda one: -counts[one])
    found = ranked[0] if kind == "auto" else kind
    clear = kind != "auto" or counts[ranked[0]] > 2 * counts[ranked[1]]
    fields = [
        {
            "name": one.name,
            "type": one.type,
            "question": one.question,
            "lines": [line.text[:300] for line in _lines_of(document.pages, one)],
        }
        for one in FIELDS[found]
    ]
    return {"kind": found, "kind_is_clear": clear, "fields": fields, **document_text.as_json(document)}


def check_fields(
    document: dict[str, Any],
    answers: Annotated[list[str | None], Field(max_length=100)],
    doubt: Annotated[float, Field(ge=0, le=1)] = DOUBT,
) -> dict[str, Any]:
    """
    Return each field with value, quote, page and confidence, and the doubts, from what a model answered for each.

    `document` is what `read_document` returned. Raises InvalidInput.
    """
    kind = document.get("kind")
    fields = next((some for one, some in FIELDS.items() if one == kind), None)
    if fields is None:
        raise table.refused("document.kind", f"{kind!r} is no kind", ", ".join(FIELDS))
    pages = _pages_of(document)
    found: dict[str, dict[str, Any]] = {}
    doubts: list[str] = []
    for one, answer in zip(fields, [*answers, *[None] * len(fields)], strict=False):
        result = _checked(one, answer, _lines_of(pages, one))
        found[one.name] = result
        if result["confidence"] < doubt:
            doubts.append(f"{one.name}: {result['reason']}")
    if document.get("kind_is_clear") is False:
        doubts.append(f"the kind of the document may not be {kind}")
    if document.get("empty_pages") or document.get("cut"):
        doubts.append("some pages have no text, or the document is too long to be read as a whole")
    return {"kind": kind, "fields": found, "doubts": doubts, "summary": _summary(found)}


@dataclass(frozen=True, slots=True)
class _Line:
    page: int
    text: str
    #: How well its label fits; 0 for a line that only follows one with a label.
    rank: float
    #: Where in the text the label ends.
    after: int


def _lines_of(pages: Sequence[Sequence[str]], field: DocumentField) -> list[_Line]:
    """Return the lines that may have a field, the best first."""
    found: list[_Line] = []
    for number, page in enumerate(pages):
        for place, text in enumerate(page):
            lower = text.lower()
            hits = [
                (match, index)
                for index, label in enumerate(field.labels)
                if (match := re.search(rf"\b{re.escape(label)}\b", lower))
            ]
            if not hits:
                continue
            match, index = min(hits, key=lambda hit: (hit[1], hit[0].start()))
            rank = 10.0 - 2 * index - min(match.start(), 40) / 10
            rank += 3.0 if text[match.end() :].lstrip().startswith(":") else 0.0
            rank += 3.0 if _candidates(field.type, text[match.end() :]) else 0.0
            found.append(_Line(number, text, rank, match.end()))
            # A label at the end of its line has its value on the next one.
            if place + 1 < len(page) and not text[match.end() :].strip(" :."):
                found.append(_Line(number, page[place + 1], rank + 1, 0))
    return sorted(found, key=lambda line: -line.rank)[:_LINES]


def _checked(field: DocumentField, answer: str | None, lines: Sequence[_Line]) -> dict[str, Any]:
    """Return what is known of a field: by the model and by code, or by one of them."""
    by_code = next(((one, line) for line in lines for one in _candidates(field.type, line.text[line.after :])), None)
    by_model = _located(field, (answer or "").strip(), lines)
    if by_model is not None and by_code is not None and _same(field, by_model[0], by_code[0]):
        return _result(field, *by_code, by="both", confidence=0.95, reason="the model and the label agree")
    if by_model is not None and field.type in ("name", "text") and by_code is None:
        return _result(field, *by_model, by="model", confidence=0.7, reason="the value has no label before it")
    if by_code is not None and (by_model is None or by_code[1].rank >= 10):
        reason = f"the model read {answer[:60]!r}" if answer else "the model read nothing"
        confidence = 0.6 if by_code[1].rank < 10 else 0.85 if field.type in ("money", "date") else 0.75
        return _result(field, *by_code, by="code", confidence=confidence, reason=reason)
    if by_model is not None:
        return _result(field, *by_model, by="model", confidence=0.6, reason="the model and the label do not agree")
    return {"value": None, "quote": None, "page": None, "by": None, "confidence": 0.0, "reason": "it was not found"}


def _result(
    field: DocumentField, value: str, line: _Line, *, by: str, confidence: float, reason: str
) -> dict[str, Any]:
    return {
        "value": _normal(field.type, value),
        "quote": line.text,
        "page": line.page + 1,
        "by": by,
        "confidence": confidence,
        "reason": reason,
    }


def _located(field: DocumentField, answer: str, lines: Sequence[_Line]) -> tuple[str, _Line] | None:
    """Return the answer of a model and its line, if it stands there and has the type of the field."""
    plain = answer.strip(" .,:;\"'")
    if len(plain) < 2:
        return None
    for line in lines:
        if plain.lower() in line.text.lower():
            typed = _candidates(field.type, plain) or ([plain] if field.type in ("name", "text") else [])
            if field.type == "money" and not typed and re.fullmatch(r"[\d,]+(?:\.\d{2})?", plain):
                typed = [plain]
            if typed:
                return typed[0], line
    return None


def _candidates(type_: FieldType, text: str) -> list[str]:
    """Return the values of a type in what follows a label."""
    match type_:
        case "money":
            return [match[0] for match in _MONEY.finditer(text)]
        case "date":
            return [match[0] for match in _DATES.finditer(text) if _normal("date", match[0]) is not None]
        case _:
            after = re.match(r"\s*(?:name)?\s*(?::|\bis\b|\u2013|-)\s*(.{2,120})", text)
            if after is None:
                return []
            value = re.split(r"[;(]|\. |, (?:an?|the|as|whose|hereinafter)\b", after[1])[0].strip(" .,")
            if type_ == "name" and not re.match(r"[A-Z\u00c0-\u024f]", value):
                return []
            return [value] if len(value) > 1 else []


def _same(field: DocumentField, one: str, other: str) -> bool:
    first, second = _normal(field.type, one), _normal(field.type, other)
    if isinstance(first, str) and isinstance(second, str):
        left, right = first.lower().strip(" ."), second.lower().strip(" .")
        # A model may leave out the end of an address; what it says is in the line anyway.
        return left == right or (field.type == "text" and min(len(left), len(right)) > 3 and right.startswith(left))
    return first is not None and first == second


def _normal(type_: FieldType, value: str) -> str | float | None:
    """Return a value in its plain form: an amount as a number, a date as `2026-01-31`, a text without extra blanks."""
    match type_:
        case "money":
            digits = re.sub(r"[^\d.]", "", value).strip(".")
            return table.number(digits)
        case "date":
            return _normal_date(value)
        case _:
            return " ".join(value.split())


def _normal_date(value: str) -> str | None:
    match = _DATES.search(value)
    if match is None:
        return None
    year, month, day, name, day_after, year_after, day_before, name_after, year_last, first, second, third = (
        match.groups()
    )
    try:
        if year:
            return date(int(year), int(month), int(day)).isoformat()
        if name:
            return date(int(year_after), _month(name), int(day_after)).isoformat()
        if name_after:
            return date(int(year_last), _month(name_after), int(day_before)).isoformat()
        # As in the United States: the month first.
        return date(int(third), int(first), int(second)).isoformat()
    except ValueError:
        return None


def _month(name: str) -> int:
    return next(i for i, one in enumerate(_MONTHS, 1) if one.startswith(name.lower()[:3]))


def _pages_of(document: Mapping[str, Any]) -> list[list[str]]:
    pages = document.get("pages")
    if not isinstance(pages, list) or len(pages) > document_text.MAX_PAGES:
        raise table.refused("document.pages", "it has no pages", "what real_estate_read_document returned")
    found = [[line for line in page if isinstance(line, str)] for page in pages if isinstance(page, list)]
    if sum(len(line) for page in found for line in page) > document_text.MAX_TEXT:
        raise table.refused("document.pages", "the text is too long", f"at most {document_text.MAX_TEXT} characters")
    return found


def _summary(fields: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join(
        f"{name}: {'?' if one['value'] is None else one['value']} ({round(100 * one['confidence'])} %)"
        + ("" if one["quote"] is None else f" — page {one['page']}: “{one['quote'][:200]}”")
        for name, one in fields.items()
    )
