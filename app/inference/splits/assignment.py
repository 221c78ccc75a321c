"""
Assignment: which variant of a split somebody gets.

It is a hash of the split and the unit, so it holds on every host and after every restart, and nothing is stored. Each
candidate has a range of the hashes that begins at a fixed place, so that a ramp adds units to it and takes none away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.inference.splits.definition import CONTROL, SplitCandidate, SplitDefinition, SplitUnit
from app.workflows.language.definition import ASSIGNED_LABELS

#: The beginning of the label of a run that names its variant; the name of the split follows.
VARIANT_LABEL = ASSIGNED_LABELS
#: The label with the hash of the unit, where that is not the run itself. No split has this name.
UNIT_LABEL = f"{ASSIGNED_LABELS}_unit"
#: Bytes of the hash of a unit in a label: enough that no two units of one split meet.
_UNIT_BYTES = 10
_HASH_BYTES = 8
#: Fields of a call that name its conversation, the first that is there.
_SESSION_FIELDS = ("conversation_id", "conversation", "previous_response_id", "prompt_cache_key")
_USER_FIELDS = ("user", "safety_identifier")


@dataclass(frozen=True, slots=True)
class ActiveSplit:
    """A split that assigns now."""

    id: str
    definition: SplitDefinition
    #: The part of the traffic that each candidate gets.
    share: float

    @property
    def name(self) -> str:
        """The name of the split."""
        return self.definition.split

    def holds_in(self, namespace: str) -> bool:
        """Whether it divides what a namespace sends."""
        return not self.definition.namespaces or namespace in self.definition.namespaces

    def variant(self, namespace: str, unit: str, user: str | None = None) -> str:
        """Return the name of the variant for a unit; pins go first, and name users as they were sent."""
        for pin in self.definition.pins:
            if namespace in pin.namespaces or (user is not None and user in pin.users):
                return pin.variant
        place = _place(self.id, namespace, unit)
        for number, candidate in enumerate(self.definition.candidates):
            begin = number * self.definition.most
            if begin <= place < begin + self.share:
                return candidate.name
        return CONTROL


@dataclass(frozen=True, slots=True)
class Assigned:
    """What a split made of a call or a run."""

    split: str
    variant: str
    #: None for the control.
    candidate: SplitCandidate | None
    #: The labels that record it.
    labels: Mapping[str, str]


def assign(split: ActiveSplit, namespace: str, unit: str | None, run_id: str, user: str | None = None) -> Assigned:
    """Assign a unit, or the run itself where it has none."""
    variant = split.variant(namespace, unit or run_id, user)
    labels = {f"{VARIANT_LABEL}{split.name}": variant}
    if unit is not None:
        digest = hashlib.blake2b(f"{namespace}\0{unit}".encode(errors="replace"), digest_size=_UNIT_BYTES)
        labels[UNIT_LABEL] = digest.hexdigest()
    return Assigned(split.name, variant, split.definition.candidate(variant), labels)


def unit_of_call(kind: SplitUnit, body: Mapping[str, Any]) -> str | None:
    """Return who is assigned in a call of OpenAI's form; None: the call by itself."""
    match kind:
        case SplitUnit.USER:
            return user_of_call(body)
        case SplitUnit.SESSION:
            return _first(body, _SESSION_FIELDS) or user_of_call(body)
    return None


def user_of_call(body: Mapping[str, Any]) -> str | None:
    """Return the user that a call names."""
    return _first(body, _USER_FIELDS)


def unit_of_run(kind: SplitUnit, labels: Mapping[str, str]) -> str | None:
    """Return who is assigned in a run, by its labels; None: the run by itself."""
    match kind:
        case SplitUnit.USER:
            return labels.get("user")
        case SplitUnit.SESSION:
            return labels.get("session") or labels.get("user")
    return None


def _first(body: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        value = body.get(name)
        if isinstance(value, Mapping):  # a conversation of the Responses API
            value = value.get("id")
        if isinstance(value, str) and value:
            return value
    return None


def _place(split: str, namespace: str, unit: str) -> float:
    """The place of a unit among all, from 0 to 1."""
    digest = hashlib.blake2b(
        f"{namespace}\0{unit}".encode(errors="replace"), digest_size=_HASH_BYTES, key=split.encode()
    ).digest()
    return int.from_bytes(digest) / float(2 ** (8 * _HASH_BYTES))
