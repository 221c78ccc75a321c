"""
A footprint: the bytes that a model in a configuration takes of each device, where the figure comes from, and what is
added to it to be safe.

Bytes are per device: the host's RAM is the first, and GPUs follow in the order in which the process sees them.
Where they come from: `reckoning` works them out from a header, `estimate` asks llama.cpp and remembers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

#: Places of a share: the host, and the GPUs from 0 on.
HOST = -1

MIB = 2**20

#: Parts that are added to what is exact, what is fitted, what is not proven, and what was measured.
_EXACT, _FITTED, _UNPROVEN, _SEEN = 0.01, 0.15, 0.30, 0.02
#: A margin has so many bytes at the least.
_LEAST = 32 * MIB


class FootprintSource(StrEnum):
    """Where a figure comes from, the best first."""

    #: A process that ran so.
    MEASURED = "measured"
    #: llama.cpp, without allocating.
    DRY_RUN = "dry run"
    #: The file's header.
    CLOSED_FORM = "closed form"


@dataclass(frozen=True, slots=True)
class Share:
    """What is taken of one device."""

    #: `HOST`, or the number of a GPU in the order in which the process sees them.
    place: int
    weights: int = 0
    #: Keys, values and states.
    cache: int = 0
    #: What llama.cpp computes in.
    compute: int = 0
    #: Logits and vectors, in the host's memory.
    output: int = 0
    #: What the process takes besides: the interpreter, the tokenizer, working memory; on a GPU the driver's context.
    process: int = 0
    #: At the most, for the states of parked requests.
    parked: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part) for part in PARTS)


#: The parts of a share, in the order in which they are shown.
PARTS = tuple(field.name for field in fields(Share) if field.name != "place")


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes, by device."""

    source: FootprintSource
    shares: tuple[Share, ...]
    #: Bytes that are added for each place, to be safe.
    margins: Mapping[int, int]
    #: What a reader should know of these figures.
    notes: tuple[str, ...] = ()
    #: Bytes of the host's weights that lie in memory of the process, beside the file: kept in another order.
    copied: int = 0

    def reserved(self) -> dict[int, int]:
        """Bytes to reserve at each place: all that is taken, and the margin."""
        return {share.place: share.total + self.margins.get(share.place, 0) for share in self.shares}

    def raised(self, floor: float) -> Self:
        """The same with margins of at least this part of the total."""
        margins = {
            share.place: max(self.margins.get(share.place, 0), round(share.total * floor)) for share in self.shares
        }
        return replace(self, margins=margins)

    def or_greater(self, other: Self) -> Self:
        """At each place, this one or the other, whichever takes more there."""
        others = {share.place: share for share in other.shares}
        shares = tuple(max(share, others.get(share.place, share), key=lambda one: one.total) for share in self.shares)
        margins = {place: max(size, other.margins.get(place, 0)) for place, size in self.margins.items()}
        return replace(self, shares=shares, margins=margins)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        shares = [{part: getattr(share, part) for part in ("place", *PARTS)} for share in self.shares]
        return {
            "source": self.source.value,
            "shares": shares,
            "margins": {str(place): size for place, size in self.margins.items()},
            "notes": list(self.notes),
            "copied": self.copied,
        }

    @classmethod
    def of_json(cls, given: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        return cls(
            FootprintSource(given["source"]),
            tuple(Share(**share) for share in given["shares"]),
            {int(place): size for place, size in given["margins"].items()},
            tuple(given["notes"]),
            given["copied"],
        )


def margin_of_reckoning(share: Share, *, proven: bool) -> int:
    """What is added to a closed form; `proven` says that llama.cpp was seen to give the same for its architecture."""
    if not proven:
        exact = share.weights + share.output
        return max(round(exact * _EXACT + (share.total - exact - share.parked) * _UNPROVEN), _LEAST)
    exact = share.weights + share.cache + share.output
    return max(round(exact * _EXACT + (share.compute + share.process) * _FITTED), _LEAST)


def margin_of_dry_run(share: Share) -> int:
    """What is added where llama.cpp counted all but the process's own part."""
    return max(round(_counted(share) * _EXACT + share.process * _FITTED), _LEAST)


def margin_of_measured(share: Share) -> int:
    """What is added to what was measured."""
    return max(round((share.total - share.parked) * _SEEN), _LEAST)


def _counted(share: Share) -> int:
    """What llama.cpp counts. What is parked is a bound already."""
    return share.total - share.parked - share.process
