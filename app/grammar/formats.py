"""
Formats: a pattern for each format that a grammar supports.

Each pattern accepts only texts of the format, but not all: e-mail addresses, host names and URIs are limited to common
forms. Times follow RFC 3339, with an offset and without leap seconds; dates are valid calendar dates.
"""

from __future__ import annotations

from collections.abc import Mapping

_LONG_MONTH = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
_SHORT_MONTH = "(0[469]|11)-(0[1-9]|[12][0-9]|30)"
_FEBRUARY = "02-(0[1-9]|1[0-9]|2[0-8])"
_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = f"({_YEAR}-({_LONG_MONTH}|{_SHORT_MONTH}|{_FEBRUARY})|{_LEAP_YEAR}-02-29)"
_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_CLOCK}:[0-5][0-9](\\.[0-9]{{1,6}})?(Z|[+-]{_CLOCK})"
_BYTE = "([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_LABEL = "[A-Za-z0-9]+(-+[A-Za-z0-9]+)*"
_URI = "[A-Za-z0-9._~!$&'()*+,;=:@/-]"
_ATOM = "[A-Za-z0-9_+-]+"

#: The pattern of each format.
PATTERNS: Mapping[str, str] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": "^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
    "ipv4": f"^({_BYTE}\\.){{3}}{_BYTE}$",
    "hostname": f"^{_LABEL}(\\.{_LABEL})*$",
    "email": f"^{_ATOM}(\\.{_ATOM})*@({_LABEL}\\.)+[A-Za-z]{{2,8}}$",
    "uri": f"^https?://({_LABEL}\\.)*{_LABEL}(:[1-9][0-9]{{0,3}})?(/{_URI}*)?(\\?{_URI}*)?(#{_URI}*)?$",
}

#: Maximum characters of formats without a fixed length, unless maxLength is less. It ensures that no label of a host
#: name exceeds 63 characters.
MAX_LENGTHS: Mapping[str, int] = {"hostname": 63, "email": 64, "uri": 120}
