"""Who acts on the firings of rules."""

from __future__ import annotations

from collections.abc import Sequence

from app.governance.rules.firing import FiringHooks
from workers.runtime import Runtime


def hooks_of(_: Runtime) -> Sequence[FiringHooks]:
    """Return who is called when a rule begins to fire, and when it is cleared."""
    return ()
