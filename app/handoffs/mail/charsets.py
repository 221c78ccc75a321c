"""
Charsets of mail: bytes become text by the charset that a mail names, when it is one of mail.

Python's registry also has codecs that unpack archives or take quadratic time. Only those of `_KNOWN` are used.
"""

from __future__ import annotations

import codecs

from app.kernel.security import texts

#: Most characters of the name of a charset.
_MAX_NAME = 40
#: The names under which Python's registry has them.
_KNOWN = frozenset(
    {
        *("utf-8", "utf-7", "utf-16", "utf-16-be", "utf-16-le", "ascii", "koi8-r", "koi8-u", "tis-620", "hz"),
        *(f"iso8859-{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16)),
        *(f"cp{n}" for n in (437, 850, 852, 866, 874, 932, 949, 950, *range(1250, 1259))),
        *("big5", "big5hkscs", "gb2312", "gbk", "gb18030", "shift_jis", "euc_jp", "euc_kr", "johab"),
        *("iso2022_jp", "iso2022_jp_1", "iso2022_jp_2", "iso2022_kr", "mac-roman", "utf-32"),
    }
)
#: Names that programs write and Python does not know.
_ALIASES = {
    "windows-874": "cp874",
    "iso-8859-8-i": "iso8859-8",
    "iso-8859-8-e": "iso8859-8",
    "x-sjis": "cp932",
    "x-gbk": "gbk",
    "utf8mb4": "utf-8",
}


def decoded(data: bytes, charset: str) -> tuple[str, bool]:
    """
    Return a text, and whether each byte of it had a meaning in the charset.

    A charset that is missing, unknown or wrong is replaced by UTF-8, and then by Windows-1252. The text can be stored.
    """
    name = _known(charset)
    try:
        if name is not None:
            return _clean(data.decode(name)), True
    except UnicodeError:
        pass
    try:
        return _clean(data.decode("utf-8")), not charset
    except UnicodeDecodeError:
        return _clean(data.decode("cp1252", errors="replace")), False


def _known(charset: str) -> str | None:
    """Return the codec of a charset, None for one that is not used; ASCII is read as UTF-8, which contains it."""
    if not charset.isascii() or len(charset) > _MAX_NAME or "\0" in charset:
        return None
    try:
        name = charset.strip().lower()
        name = codecs.lookup(_ALIASES.get(name, name)).name
    except (LookupError, ValueError):
        return None
    if name not in _KNOWN:
        return None
    return "utf-8" if name == "ascii" else "cp1252" if name == "iso8859-1" else name


def _clean(text: str) -> str:
    return texts.storable(text.removeprefix("\ufeff"))
