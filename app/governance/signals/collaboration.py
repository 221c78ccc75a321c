"""
The collaboration score: how well models share, hand work over and work together, from 0 to 1.

It is the mean of the parts that were observed in the last hour:

    sharing       one minus the loads of models by the steps that they served: 0 when each step loads its model,
                  near 1 when a load serves many steps
    hand-offs     called runs that succeeded, by those that ended
    cooperation   attempts that succeeded, of those that go on with the results of other steps
"""

from __future__ import annotations


def score(sharing: float | None, handoffs: float | None, cooperation: float | None) -> float | None:
    """Return the score; None when no part was observed."""
    parts = [min(1.0, max(0.0, part)) for part in (sharing, handoffs, cooperation) if part is not None]
    return sum(parts) / len(parts) if parts else None
