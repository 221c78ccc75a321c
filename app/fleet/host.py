"""A host: its scheduling state, which all of its devices have. Values only."""

from __future__ import annotations

from enum import StrEnum


class HostState(StrEnum):
    """The scheduling state of a host."""

    SCHEDULABLE = "schedulable"
    #: No new pool is placed on it.
    CORDONED = "cordoned"
    #: Cordoned, and its pools are moved or stopped.
    DRAINING = "draining"
    #: It sent no heartbeat for too long. Nothing is placed on it until its agent has joined again.
    LOST = "lost"
