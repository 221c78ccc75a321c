"""Documents: values that stand in their lines, doubts about the others, and files that are hostile."""

from __future__ import annotations

import base64
import contextlib
import io
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pypdf import PdfWriter

from app.kernel.errors import InvalidInput
from app.real_estate import documents
from benchmarks import real_estate_data

PAPERS = real_estate_data.papers(9, 12)


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_right_answer_is_certain_and_quoted_from_its_page() -> None:
    for paper in PAPERS:
        found = documents.read_document(pdf=as_base64(real_estate_data.pdf(paper.pages)))
        assert (found["kind"], found["kind_is_clear"]) == (paper.kind, True)
        answers = [
            "" if paper.truth[field["name"]] is None else str(paper.truth[field["name"]]) for field in found["fields"]
        ]
        for name, field in documents.check_fields(found, answers)["fields"].items():
            assert field["value"] in (paper.truth[name], None), (paper.kind, name, field)
            if field["value"] is not None:
                assert field["quote"] in paper.pages[field["page"] - 1]


def test_an_invented_answer_is_never_taken() -> None:
    for paper in PAPERS:
        found = documents.read_document(text="\f".join("\n".join(page) for page in paper.pages))
        checked = documents.check_fields(found, ["Zacharias Zorn 9,999,999.00 2031-07-07"] * 10)
        for name, field in checked["fields"].items():
            assert "Zorn" not in str(field["value"])
            assert field["confidence"] < 0.9, "nobody confirms the label"
            assert field["value"] is not None or any(name in doubt for doubt in checked["doubts"])


def test_a_missing_field_is_a_doubt_and_has_no_value() -> None:
    text = "RESIDENTIAL LEASE\nLandlord: Mara Lind\nTenant: Owen Cast\nThe monthly rent is $900.00."
    checked = documents.check_fields(documents.read_document(text=text), ["Mara Lind", "Owen Cast", None, "$900.00"])
    assert checked["fields"]["rent"]["value"] == 900.0
    assert checked["fields"]["deposit"] == {
        "value": None,
        "quote": None,
        "page": None,
        "by": None,
        "confidence": 0.0,
        "reason": "it was not found",
    }
    assert "deposit: it was not found" in checked["doubts"]


@pytest.mark.parametrize(
    "written", ["2026-03-04", "March 4, 2026", "4 March 2026", "Mar 4 2026", "03/04/2026", "4 mar. 2026"]
)
def test_dates_have_one_form(written: str) -> None:
    found = documents.read_document(text=f"Deed\nGrantor: A B\nDated {written} at noon", kind="deed")
    checked = documents.check_fields(found, [None, None, None, None, written])
    assert (checked["fields"]["date"]["value"], checked["fields"]["date"]["confidence"]) == ("2026-03-04", 0.95)


def encrypted() -> bytes:
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.encrypt("x", algorithm="RC4-128")
    target = io.BytesIO()
    writer.write(target)
    return target.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"pdf": "a", "text": "b"},
        {"pdf": "***"},
        {"pdf": as_base64(b"hello")},
        {"pdf": as_base64(b"%PDF-1.4\n")},
        {"pdf": as_base64(b"%PDF-1.7\n" + b"[" * 100_000)},
        {"pdf": as_base64(real_estate_data.pdf([[]]))},
        {"pdf": "A" * (23 << 20)},
        {"text": " \n\f\n"},
    ],
)
def test_what_is_no_document_is_refused(arguments: Any) -> None:
    with pytest.raises(InvalidInput) as found:
        documents.read_document(**arguments)
    assert found.value.problems[0].accepted


def test_an_encrypted_file_is_refused() -> None:
    with pytest.raises(InvalidInput, match="encrypted"):
        documents.read_document(pdf=as_base64(encrypted()))


def test_a_damaged_file_is_read_or_refused_and_never_more() -> None:
    whole = real_estate_data.pdf(PAPERS[0].pages)
    chance = random.Random(3)
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 30)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        with contextlib.suppress(InvalidInput):
            found = documents.read_document(pdf=as_base64(bytes(broken[: chance.randrange(20, len(broken))])))
            assert any(found["pages"])


def test_pages_without_text_are_a_doubt() -> None:
    found = documents.read_document(pdf=as_base64(real_estate_data.pdf([PAPERS[0].pages[0], []])))
    assert found["empty_pages"] == 1
    assert any("no text" in doubt for doubt in documents.check_fields(found, [])["doubts"])


@given(st.text(max_size=400), st.lists(st.one_of(st.none(), st.text(max_size=40)), max_size=9))
def test_no_text_makes_the_reading_fail(text: str, answers: list[str | None]) -> None:
    lines = f"Landlord: x\nmonthly rent\n{text}\nRent: $5 {text}"
    found = documents.read_document(text=lines, kind="lease")
    for field in documents.check_fields(found, answers)["fields"].values():
        assert 0 <= field["confidence"] <= 1


@pytest.mark.parametrize(
    "document", [{}, {"kind": "lease"}, {"kind": "poem", "pages": []}, {"kind": ["x"], "pages": 5}]
)
def test_a_document_of_another_form_is_refused(document: Any) -> None:
    with pytest.raises(InvalidInput):
        documents.check_fields(document, [])
