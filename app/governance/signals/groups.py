"""
Groups of series: all series of a signal that share some labels, whatever their others are.

A chart of hundreds of series reads the points of a few groups instead. Which labels a group keeps is one of a few sets:
none, each single one, and each together with the namespace, so that one namespace is read as fast as all.
A set that has every label of a signal is left out: its groups would be the series themselves. So is that of pools
within a namespace, which has nearly as many groups as there are series.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain

from app.governance.signals.names import LABELS, SIGNALS, SignalDefinition

_NAMESPACE, _POOL = "namespace", "pool"


def _name(labels: Collection[str]) -> str:
    return ",".join(label for label in LABELS if label in labels)


def _sets(definition: SignalDefinition) -> Sequence[str]:
    singles = [{label} for label in definition.labels]
    pairs = [{label, _NAMESPACE} for label in definition.labels if label not in (_NAMESPACE, _POOL)]
    wanted = chain([set[str]()], singles, pairs if _NAMESPACE in definition.labels else [])
    return [_name(labels) for labels in wanted if labels != set(definition.labels)]


#: By signal, the sets of labels that its groups keep: each is the labels, in the order of `LABELS`, with commas.
KEPT_LABELS: Mapping[str, Sequence[str]] = {name: _sets(definition) for name, definition in SIGNALS.items()}


def group_of(signal: str, labels: Collection[str]) -> str | None:
    """Return the set of labels whose groups answer a query over these labels; None: only the series do."""
    name = _name(labels)
    return name if name in KEPT_LABELS[signal] else None
