"""
Namespaces: the tenant of a run. Each has its own share of the fleet and its own limits.

The label `namespace` of a run names its namespace; without it, this is `default`. Called runs inherit the label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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


def inherited_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Returns the labels that a called run inherits from its caller."""
    return {LABEL: labels[LABEL]} if LABEL in labels else {}
