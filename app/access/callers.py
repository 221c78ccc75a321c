"""
The caller of a request: who it is, for which namespace it acts, and what it may do.

A caller of one namespace sees and changes nothing of another one. A caller without a namespace acts for all of them:
only it can name the namespace of what it creates.

Nothing here reads a request: `app/api/callers.py` finds the caller of a request.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from app.access import namespaces
from app.kernel.errors import ArrieroError, InvalidInput, Problem


class KeyScope(StrEnum):
    """What a caller may do. No scope includes another one."""

    #: Create runs, call models, upload files, send events, and cancel what is the caller's.
    SUBMIT = "submit"
    #: Look at everything of its namespace.
    READ = "read"
    #: Change what others rely on: workflows, schedules, pools, hosts, models.
    OPERATE = "operate"
    #: Keys, limits, settings, the audit log.
    ADMIN = "admin"


class NotAuthenticated(ArrieroError):
    """The request needs an API key, and it has none or one that is not valid."""

    def __init__(self, message: str, *, has_key: bool) -> None:
        #: The request has a key that is refused.
        self.has_key = has_key
        super().__init__(message)


class NotAllowed(ArrieroError):
    """The API key is valid, but it does not allow the request."""

    def __init__(self, message: str, scopes: Collection[KeyScope]) -> None:
        #: The scopes of which the request needs one.
        self.scopes = tuple(sorted(scopes))
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    #: The name that history and audit log show: that of the key.
    name: str
    #: The only namespace that it acts for; None for all of them.
    namespace: str | None
    scopes: frozenset[KeyScope]
    #: The id of its key; None for a caller without one.
    key_id: str | None = None

    def labels(self, given: Mapping[str, str]) -> dict[str, str]:
        """
        Return the labels of what this caller creates: the given ones, with its namespace.

        Raises InvalidInput for the label of another namespace.
        """
        named = given.get(namespaces.LABEL)
        if self.namespace is None:
            return dict(given)
        if named not in (None, self.namespace):
            message = f"{named!r} is not the namespace of the API key"
            raise InvalidInput([Problem(f"labels.{namespaces.LABEL}", message, self.namespace)], "request")
        return {**given, namespaces.LABEL: self.namespace}

    def namespace_of(self, labels: Mapping[str, str]) -> str:
        """Return the namespace of what this caller creates with these labels."""
        return self.labels(labels).get(namespaces.LABEL, namespaces.DEFAULT)


#: The caller of a request without a key where keys are not required: it may do everything.
LOCAL = Caller("local", None, frozenset(KeyScope))
#: The caller with the key that `arriero up` leaves for commands on its machine.
OPERATOR = Caller("operator", None, frozenset(KeyScope))
#: The caller of a request that anybody may send, such as a health check. It acts for no namespace.
ANYBODY = Caller("anybody", "", frozenset())
