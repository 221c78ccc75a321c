"""Mail is read under bounds: what people wrote is found, whatever else the bytes are, in time that grows with them."""

from __future__ import annotations

import json
import random
import time
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from typing import Any

import pytest

from app.handoffs.mail import authentication, charsets, headers, html_text, reading, structure
from app.handoffs.mail.reading import MailEnvelope, ReadMail

HTTP = MailEnvelope("http")


def read(raw: bytes | str, **options: Any) -> ReadMail:
    return reading.read(raw.encode() if isinstance(raw, str) else raw, HTTP, **options)


def text_of(raw: bytes | str) -> str:
    return str(read(raw).message["text"])


# What people write

_WORDS = ["order", "Grüße", "東京", "naïve", "price", "Привет", "ok", "réponse", "🙂", "ขอบคุณ"]


def _sentence(chance: random.Random) -> str:
    return " ".join(chance.choice(_WORDS) for _ in range(chance.randint(1, 30)))


def _written(chance: random.Random) -> tuple[EmailMessage, str, list[bytes]]:
    """A mail as programs write it, its text, and its attachments."""
    mail, text = EmailMessage(policy=chance.choice([policy.SMTP, policy.default, policy.SMTPUTF8])), _sentence(chance)
    mail["From"], mail["Subject"] = "Ana <ana@example.com>", _sentence(chance)
    mail["Message-ID"] = f"<{chance.random()}@example.com>"
    cte = chance.choice(["base64", "quoted-printable", "8bit"])
    if chance.random() < 0.7:
        mail.set_content(text + "\n", cte=cte)
        if chance.random() < 0.5:
            mail.add_alternative(f"<html><p>{text} but in colours</p></html>", subtype="html", cte="base64")
    else:
        mail.set_content(f"<html><body><p>{text}</p></body></html>", subtype="html", cte=cte)
    files = [chance.randbytes(chance.randint(0, 3_000)) for _ in range(chance.randint(0, 4))]
    for n, data in enumerate(files):
        mail.add_attachment(data, maintype="application", subtype="octet-stream", filename=f"ß {n}.bin")
    return mail, text, files


def test_what_programs_write_is_read_as_it_was_written() -> None:
    chance = random.Random(11)
    for _ in range(300):
        mail, text, files = _written(chance)
        raw = mail.as_bytes()
        found = read(raw)
        assert found.message["text"] == text
        # What the standard library has folded may have lost a blank.
        subject = BytesParser(policy=policy.default).parsebytes(raw, headersonly=True)["Subject"]
        assert found.message["subject"] == " ".join(str(subject).split())
        assert [one.data for one in found.attachments] == files
        assert [one["name"] for one in found.message["attachments"]] == [f"ß {n}.bin" for n in range(len(files))]
        assert (found.message["defects"], found.is_cut) == ([], False)
        assert found.message["from"] == {"name": "Ana", "address": "ana@example.com"}


def test_the_parts_are_those_that_the_standard_library_finds() -> None:
    """On sound mail both agree; it is no oracle for broken mail, on which programs differ."""
    chance = random.Random(12)
    for _ in range(100):
        raw = _written(chance)[0].as_bytes()
        whole = BytesParser(policy=policy.default).parsebytes(raw)
        theirs = [part.get_payload(decode=True) for part in whole.walk() if not part.is_multipart()]
        assert [one.data.strip() for one in structure.divide(raw).parts] == [one.strip() for one in theirs]


def test_each_delivery_of_a_mail_has_the_same_key_and_no_other_mail_has_it() -> None:
    chance = random.Random(13)
    mail = _written(chance)[0]
    raw = mail.as_bytes(policy=policy.SMTP)
    relayed = b"Received: from a by b\r\nX-Spam: 0\r\nReturn-Path: <a@b.example>\r\n" + raw
    unix = raw.replace(b"\r\n", b"\n") + b"\n"
    assert {read(one).key for one in (raw, relayed, unix)} == {read(raw).key}
    assert read(raw.replace(b"Ana", b"Eva")).key != read(raw).key, "the id alone is no key: everybody can use it"

    encoded = EmailMessage()
    encoded["Message-ID"], encoded["From"] = "<1@example.com>", "a@example.com"
    encoded.set_content("é" * 100, cte="8bit")
    again = EmailMessage()
    again["Message-ID"], again["From"] = "<1@example.com>", "a@example.com"
    again.set_content("é" * 100, cte="base64")
    assert read(encoded.as_bytes()).key == read(again.as_bytes()).key, "a server has encoded it anew"


# What attackers write

_NEST = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(5_000))
_HTML = b"Content-Type: text/html\n\n"
NASTY = {
    "nothing but a line": b"\n",
    "no body": b"From: a@example.com",
    "NUL": b"Subject: a\0b\n\nc\0d",
    "random bytes": random.Random(1).randbytes(100_000),
    "deep multiparts": _NEST,
    "a boundary in itself": b"Content-Type: multipart/mixed; boundary=b\n\n"
    + b"--b\nContent-Type: multipart/mixed; boundary=b\n\n" * 2_000,
    "a million parts": b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\nx\n" * 300_000,
    "a boundary that is never used": b"Content-Type: multipart/mixed; boundary=b\n\nhello",
    "no boundary": b"Content-Type: multipart/mixed\n\nhello",
    "a long boundary": b'Content-Type: multipart/mixed; boundary="' + b"b" * 1_500 + b'"\n\nhello',
    "an empty boundary": b'Content-Type: multipart/mixed; boundary=""\n\n--\n\nhello\n----\n',
    "no end": b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\nhello",
    "many headers": b"A: b\n" * 200_000 + b"\nhello",
    "a long header": b"Subject: " + b"x" * 3_000_000 + b"\n\nhello",
    "a folded header": b"Subject: x\n" + b" y\n" * 300_000 + b"\nhello",
    "encoded words": b"Subject: " + b"=?utf-8?q?" * 10_000 + b"\n\nhello",
    "brackets": b"From: " + b"(" * 50_000 + b"<" * 50_000 + b"\n\nhello",
    "quotes": b'From: "' + b'\\"' * 50_000 + b"\n\nhello",
    "references": b"References: " + b"<a@b> " * 20_000 + b"\n\nhello",
    "parameters": b"Content-Type: text/plain" + b"; a*0*=b" * 5_000 + b"\n\nhello",
    "a parameter with a huge number": b"Content-Type: text/plain; name*" + b"9" * 1_900 + b"=x\n\nhello",
    "a charset that unpacks": b"Content-Type: text/plain; charset=zlib\n\nhello",
    "a charset in quadratic time": b"Content-Type: text/plain; charset=idna\n\n" + b"x" * 300_000,
    "a charset with NUL": b'Content-Type: text/plain; charset="utf\0-8"\n\nhello',
    "lone surrogates": b"Content-Type: text/plain; charset=utf-7\n\n+2AA- hello",
    "broken base64": b"Content-Transfer-Encoding: base64\n\n" + b"A" * 1_000_001,
    "no base64": b"Content-Transfer-Encoding: base64\n\n\xff\xfe!!",
    "an unknown encoding": b"Content-Transfer-Encoding: x-uuencode\n\nbegin 644 x\n",
    "open tags": _HTML + b"<a href=" * 200_000,
    "open comments": _HTML + b"<!--" * 200_000,
    "open heads": _HTML + b"<head>" * 200_000,
    "open quotes": _HTML + b"<a x='\">" * 200_000,
    "open scripts": _HTML + b"<script></scrip" * 100_000,
    "entities": _HTML + b"&#x41;&amp;amp;&" * 60_000,
    "a file name with folders": b'Content-Disposition: attachment; filename="../../etc/passwd"\n\nx',
    "a date of no calendar": b"Date: Mon, 99 Xxx 99999 99:99:99 +9999\n\nhello",
    "an mbox line": b"From a@b Mon Nov 23\nSubject: x\n\nhello",
    "parts that are cut by a lone carriage return": b"Content-Type: multipart/mixed; boundary=b\r\r--b\r\rhello",
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_mail_is_a_message_that_can_be_stored(name: str) -> None:
    began = time.process_time()
    found = read(NASTY[name])
    assert time.process_time() - began < 20, "its time grows with its length"

    stored = json.dumps(found.message)
    assert "\\u0000" not in stored
    json.dumps(found.message, ensure_ascii=False).encode("utf-8")
    assert len(stored) < 4_000_000
    assert len(found.attachments) <= reading.MAX_ATTACHMENTS
    assert len(found.key) <= 500
    assert len(found.message["defects"]) <= structure.MAX_DEFECTS


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("deep multiparts", "nested more than 10 deep"),
        ("a million parts", "more than 200 parts"),
        ("a boundary that is never used", "has no part"),
        ("no end", "has no end"),
        ("many headers", "more than 131072 bytes"),
        ("broken base64", "encoding of a part is broken"),
        ("a charset that unpacks", "not in the charset 'zlib'"),
    ],
)
def test_what_was_not_read_is_said(name: str, says: str) -> None:
    assert any(says in one for one in read(NASTY[name]).message["defects"])


@pytest.mark.parametrize(
    "name", ["a boundary that is never used", "no boundary", "no end", "a long boundary", "a folded header"]
)
def test_the_text_of_broken_mail_is_still_read(name: str) -> None:
    assert "hello" in json.dumps(read(NASTY[name]).message) or any(
        b"hello" in one.data for one in read(NASTY[name]).attachments
    )


def test_mutated_mail_never_raises_and_is_never_slow() -> None:
    chance = random.Random(14)
    pieces = [
        b"--b",
        b"\r\n\r\n",
        b"Content-Type: ",
        b"multipart/mixed; boundary=b",
        b"=?utf-8?b?",
        b"\0",
        b"\xff",
        b'"',
    ]
    began = time.process_time()
    for _ in range(500):
        raw = bytearray(_written(chance)[0].as_bytes())
        for _ in range(chance.randint(1, 30)):
            at = chance.randrange(len(raw))
            raw[at : at + chance.randint(0, 20)] = chance.choice(pieces)
        found = read(bytes(raw))
        json.dumps(found.message, ensure_ascii=False).encode("utf-8")
    assert time.process_time() - began < 60


# Texts


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a</p><p>b</p>", "a\n\nb"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("<ul><li>a</li><li>b</li></ul>", "- a\n\n- b"),
        ('see <a href="https://x.example/?a=1&amp;b=2">this</a>', "see this <https://x.example/?a=1&b=2>"),
        ('<a href="javascript:alert(1)">x</a>', "x"),
        ("<style>p {}</style><script>if (1 < 2) {}</script>x", "x"),
        ("1 < 2 &amp; 3 &gt; 2", "1 < 2 & 3 > 2"),
        ("<!-- hidden --> shown", "shown"),
        ('<img alt="a > b">c', "c"),
        ("<table><tr><td>a</td><td>b</td></tr></table>", "a b"),
    ],
)
def test_the_text_of_html(html: str, text: str) -> None:
    assert html_text.text_of(html) == text


def test_the_plain_text_is_chosen_unless_it_is_empty() -> None:
    head = "Content-Type: multipart/alternative; boundary=b\n\n"
    html = "--b\nContent-Type: text/html\n\n<b>rich</b>\n--b--\n"
    assert text_of(f"{head}--b\n\nplain\n{html}") == "plain"
    assert text_of(f"{head}--b\n\n \n{html}") == "rich"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("=?utf-8?q?Gr=C3=BC=C3=9Fe?= x", "Grüße x"),
        ("=?utf-8?b?4oK?= =?utf-8?b?rA==?=", "€"),  # one character in two words
        ("=?iso-8859-1?q?=E9?= =?iso-8859-1?q?=E8?=", "éè"),
        ("=?koi8-r?b?8NLJ18XU?=", "Привет"),
        ("=?unknown?q?=C3=A9?=", "é"),
        ("=?utf-8*de?q?a?=", "a"),
        ("=?utf-8?q?broken", "=?utf-8?q?broken"),
        ("plain", "plain"),
    ],
)
def test_encoded_words(value: str, text: str) -> None:
    assert headers.unencoded(value) == text


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("Ana <ana@example.com>, bob@example.com", [("Ana", "ana@example.com"), ("", "bob@example.com")]),
        ('"Doe, Jane" <jane@example.com>', [("Doe, Jane", "jane@example.com")]),
        ("=?utf-8?q?J=C3=BCrgen?= <j@example.com>", [("Jürgen", "j@example.com")]),
        ("a@example.com (a comment, with a comma)", [("", "a@example.com")]),
        ("Friends: a@example.com, b@example.com;", [("", "a@example.com"), ("", "b@example.com")]),
        ("undisclosed-recipients:;", []),
        ('"evil@attacker.example" <real@example.com>', [("evil@attacker.example", "real@example.com")]),
        ("nobody", []),
    ],
)
def test_addresses(value: str, found: list[tuple[str, str]]) -> None:
    assert [(one.name, one.address) for one in headers.addresses(value)] == found


def test_texts_of_charsets() -> None:
    assert charsets.decoded("é".encode("latin-1"), "iso-8859-1") == ("é", True)
    assert charsets.decoded("é".encode(), "") == ("é", True)
    assert charsets.decoded("é".encode(), "us-ascii") == ("é", True)
    assert charsets.decoded("é".encode("latin-1"), "utf-8") == ("é", False)
    assert charsets.decoded("ขอบคุณ".encode("cp874"), "windows-874") == ("ขอบคุณ", True)
    assert charsets.decoded(b"x", "x" * 10_000) == ("x", False)


# Who wrote it

SENT = "From: a@example.com\nTo: b@example.com\n"


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("Auto-Submitted: auto-replied", "Auto-Submitted"),
        ("Auto-Submitted: auto-generated; owner=x", "Auto-Submitted"),
        ("Precedence: bulk", "Precedence"),
        ("Precedence: list", "Precedence"),
        ("X-Autoreply: yes", "x-autoreply"),
        ("Return-Path: <>", "return path"),
        ("Content-Type: multipart/report; report-type=delivery-status; boundary=b", "delivery-status"),
        ("X-Arriero-Handoff: mail", "Arriero has sent it"),
        ("Received: x\n" * 51 + "X: y", "51 servers"),
    ],
)
def test_mail_of_machines_is_skipped_with_the_reason(header: str, says: str) -> None:
    assert says in read(f"{SENT}{header}\n\nI am away").skipped


@pytest.mark.parametrize("header", ["Auto-Submitted: no", "Precedence: normal", "Return-Path: <a@example.com>", "X: y"])
def test_mail_of_people_is_not_skipped(header: str) -> None:
    assert read(f"{SENT}{header}\n\nhello").skipped == ""


def test_a_bounce_is_known_by_its_envelope_and_a_loop_by_its_sender() -> None:
    raw = f"{SENT}\nhello".encode()
    assert "return path" in reading.read(raw, MailEnvelope("smtp", "")).skipped
    assert reading.read(raw, MailEnvelope("smtp", "a@example.com")).skipped == ""
    assert "address of the answers" in read(raw, own=["A@example.com"]).skipped
    assert "a mail server" in read("From: MAILER-DAEMON@example.com\n\nx").skipped


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("mx.example.com; spf=pass smtp.mailfrom=a; dkim=pass header.d=a; dmarc=pass", ("pass", "pass", "pass")),
        ("MX.example.com 1; dmarc=fail (p=reject; dis=none) header.from=a", ("", "", "fail")),
        ("mx.example.com; dkim=fail; dkim=pass header.d=x; dkim=none", ("", "pass", "")),
        ('mx.example.com; x="; spf=pass"', ("", "", "")),
        ("mx.example.com (; spf=pass); none", ("", "", "")),
        ("mx.attacker.example; spf=pass; dkim=pass; dmarc=pass", ("", "", "")),
        ("mx.example.com.attacker.example; dmarc=pass", ("", "", "")),
        ("mx.example.com", ("", "", "")),
    ],
)
def test_results_of_authentication_count_only_from_the_trusted_server(header: str, said: tuple[str, ...]) -> None:
    found = headers.split(f"Authentication-Results: {header}\n\n".encode())[0]
    assert tuple(authentication.results(found, "mx.example.com").values()) == said
    assert set(authentication.results(found, "").values()) == {""}


def test_only_the_first_result_of_the_trusted_server_counts() -> None:
    raw = "Authentication-Results: mx.example.com; dmarc=fail\nAuthentication-Results: mx.example.com; dmarc=pass\n\nx"
    assert "dmarc is fail" in read(raw, server="mx.example.com", require=["dmarc"]).skipped
    assert "dmarc is not given" in read("Subject: x\n\nx", server="mx.example.com", require=["dmarc"]).skipped


def test_the_thread_of_a_mail() -> None:
    assert read("Message-ID: <c@x>\nReferences: <a@x> <b@x>\nIn-Reply-To: <b@x>\n\n").message["thread"] == "<a@x>"
    assert read("Message-ID: <c@x>\nIn-Reply-To: <b@x>\n\n").message["thread"] == "<b@x>"
    assert read("Message-ID: <c@x>\n\n").message["thread"] == "<c@x>"
    assert read("Subject: x\n\n").message["thread"].startswith("#")
