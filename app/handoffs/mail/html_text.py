"""
The text of HTML mail. One pass, whose time grows with the length only; nothing in it is fetched or executed.

Elements of blocks begin a line, the address of a link follows its text, styles and scripts are left out.
"""

from __future__ import annotations

import html
import re

#: Most characters that are read.
MAX_HTML = 1_000_000
#: Most characters of a tag that is looked at.
_MAX_TAG = 4_000
#: Elements whose content is no text.
_SILENT = frozenset({"head", "script", "style", "template", "title", "noscript", "object", "svg"})
_BLOCKS = frozenset(
    {
        *("address", "article", "blockquote", "br", "center", "dd", "div", "dl", "dt", "footer", "form", "h1", "h2"),
        *("h3", "h4", "h5", "h6", "header", "hr", "li", "ol", "p", "pre", "section", "table", "tbody", "tr", "ul"),
    }
)
_CELLS = frozenset({"td", "th"})
_NAME = re.compile(r"(/?)([a-zA-Z][a-zA-Z0-9]{0,20})")
_LINK = re.compile(r"""\bhref\s{0,9}=\s{0,9}(?:"([^"]{1,2000})"|'([^']{1,2000})')""", re.IGNORECASE)
_BLANKS = re.compile(r"[ \t\u00a0]+")
_LINES = re.compile(r"\n{3,}")


def text_of(source: str) -> str:
    """Return the text of a document or of a piece of one. Never raises."""
    source = source[:MAX_HTML]
    found: list[str] = []
    link, at, has_open_head = "", 0, False
    while True:
        tag = source.find("<", at)
        found.append(_plain(source[at:] if tag < 0 else source[at:tag]))
        if tag < 0:
            break
        if source.startswith("<!--", tag):
            end = source.find("-->", tag)
            if end < 0:
                break
            at = end + 3
            continue
        name = _NAME.match(source, tag + 1)
        if name is None and source[tag + 1 : tag + 2] not in ("!", "?"):
            found.append("<")
            at = tag + 1
            continue
        at = _end_of_tag(source, tag)
        if name is None:
            continue
        closing, element = bool(name[1]), name[2].lower()
        if element in _SILENT and not closing:
            if element == "head" and has_open_head:
                continue
            ending = _end_of_element(source, element, at)
            if ending >= 0:
                at = ending
            elif element == "head":  # some mail has one that is never closed
                has_open_head = True
            else:
                break
        elif element in _BLOCKS:
            found.append("\n- " if element == "li" and not closing else "\n")
        elif element in _CELLS and closing:
            found.append("\t")
        elif element == "a":
            if closing and link:
                found.append(f" <{link}>")
            link = "" if closing else _address(source[tag : min(at, tag + _MAX_TAG)])
    return _tidied("".join(found))


def _plain(text: str) -> str:
    return html.unescape(" ".join(text.split("\n")).replace("\r", " "))


def _end_of_tag(source: str, tag: int) -> int:
    """Return where the text after a tag begins. A quote that is never closed does not hide what follows it."""
    end = source.find(">", tag)
    if end < 0:
        return len(source)
    quoted = source[tag : min(end, tag + _MAX_TAG)]
    for quote in ('"', "'"):
        if quoted.count(quote) % 2 and quoted.count("=" + quote):
            close = source.find(quote, end, tag + _MAX_TAG)
            after = source.find(">", close, tag + _MAX_TAG) if close >= 0 else -1
            return after + 1 if after >= 0 else end + 1
    return end + 1


def _end_of_element(source: str, element: str, at: int) -> int:
    """Return where the text after an element begins, or -1."""
    closing = re.compile(rf"</{element}", re.IGNORECASE).search(source, at)
    return -1 if closing is None else _end_of_tag(source, closing.start())


def _address(tag: str) -> str:
    found = _LINK.search(tag)
    address = html.unescape(found[1] or found[2] or "").strip() if found else ""
    return address if address.lower().startswith(("http://", "https://", "mailto:")) else ""


def _tidied(text: str) -> str:
    lines = (_BLANKS.sub(" ", line).strip() for line in text.split("\n"))
    return _LINES.sub("\n\n", "\n".join(lines)).strip()
