"""Who acts on the firings of rules."""

from __future__ import annotations

from collections.abc import Sequence

from app.governance.responses import Responses
from app.governance.rules.firing import FiringHooks
from workers.runtime import Runtime


def hooks_of(runtime: Runtime) -> Sequence[FiringHooks]:
    """Return who is called when a rule begins to fire, and when it is cleared."""
    assert runtime.broker is not None, "a control worker has it from its start"
    return (Responses(lambda: runtime.settings, runtime.broker),)
