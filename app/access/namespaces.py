"""
Namespaces: the tenant of a run. Each has its own share of the fleet and its own limits.

What a caller with an API key of a namespace creates belongs to that namespace. A caller without one names it with the
label `namespace` of a run; without the label it is `default`. Called runs, forks and runs of schedules inherit it.
"""

from __future__ import annotations

import re

from app.kernel.errors import InvalidInput, Problem

#: The label of a run that names its namespace.
LABEL = "namespace"
#: The namespace of runs without the label.
DEFAULT = "default"
#: Pattern of namespace names.
PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
#: What error messages say is accepted.
ACCEPTED = "lower-case letters, digits, '.', '_', '-'; at most 63"


def is_valid(name: str) -> bool:
    """Whether this can be the name of a namespace."""
    return re.fullmatch(PATTERN.strip("^$"), name, re.ASCII) is not None


def require(name: str, where: str, what: str) -> str:
    """Returns the name. Raises InvalidInput for the field `where` of the input `what` when it is not a valid name."""
    if re.match(PATTERN, name) is None:
        raise InvalidInput([Problem(where, f"{name!r} is not a valid name of a namespace", ACCEPTED)], what)
    return name
