"""
What the receiving mail server says of the sender: SPF, DKIM and DMARC, from `Authentication-Results` (RFC 8601).

Only the first such header of the server that the definition trusts counts: everybody can write others. That server
must remove those that come with its name, as RFC 8601 demands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from app.handoffs.mail.headers import MailHeaders

#: The methods that are recorded.
METHODS = ("spf", "dkim", "dmarc")
_RESULT = re.compile(r"\s*(spf|dkim|dmarc)\s*(?:/\s*\d{1,3}\s*)?=\s*([a-z]{1,20})\b", re.IGNORECASE)


def results(found: MailHeaders, server: str) -> dict[str, str]:
    """Return the results by method, such as `pass`, `fail` or `none`; empty texts where the server says nothing."""
    said = dict.fromkeys(METHODS, "")
    for value in found.all("authentication-results") if server else ():
        first, *rest = _statements(value)
        if first.split()[:1] != [server.lower()]:
            continue
        for text in rest:
            matched = _RESULT.match(text)
            # One of several signatures that holds is enough.
            if matched and said[matched[1].lower()] != "pass":
                said[matched[1].lower()] = matched[2].lower()
        break
    return said


def _statements(value: str) -> Iterator[str]:
    """Divide a value at its semicolons, without comments and outside quotes, in lower case."""
    part: list[str] = []
    depth, quoted = 0, False
    for one in value.lower():
        if one == '"' and not depth:
            quoted = not quoted
        elif one == "(" and not quoted:
            depth += 1
        elif one == ")" and not quoted and depth:
            depth -= 1
            continue
        elif one == ";" and not quoted and not depth:
            yield "".join(part)
            part = []
            continue
        if not depth:
            part.append(one)
    yield "".join(part)
