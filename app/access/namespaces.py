"""
A namespace: on whose behalf a run is done. Its share of the fleet, and the limits on it, are its own.

A run belongs to the namespace that its label `namespace` names, and to `default` without one; what it calls, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from app.kernel.errors import InvalidInput, Problem

#: The label of a run that names its namespace.
LABEL = "namespace"
#: Of runs that name none.
DEFAULT = "default"
#: Names of namespaces.
PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
#: What messages tell people to write.
ACCEPTED = "lower-case letters, digits, '.', '_', '-'; 63 at the most"


def require(name: str, where: str, what: str) -> str:
    """The name. Raises InvalidInput, with the place, when it is none."""
    if re.match(PATTERN, name) is None:
        raise InvalidInput([Problem(where, f"{name!r} is no name of a namespace", ACCEPTED)], what)
    return name


def inherited(labels: Mapping[str, str]) -> dict[str, str]:
    """What a run that is called has of its caller's labels."""
    return {LABEL: labels[LABEL]} if LABEL in labels else {}
