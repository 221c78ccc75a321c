"""
A footprint: the bytes that a model in a configuration needs on each device.

It names the source of its figures and has a safety margin.
Bytes are per device: the host's RAM is first, and GPUs follow in the order in which the process sees them.
`closed_form` computes footprints from a header; `estimate` runs llama.cpp and stores its results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

#: The place of the host in a share; GPUs have the places from 0 on.
HOST = -1

MIB = 2**20

#: Margins, as a part of exact, fitted, unverified and measured bytes.
_EXACT, _FITTED, _UNVERIFIED, _MEASURED = 0.01, 0.15, 0.30, 0.02
#: Minimum bytes of a margin.
_MIN_MARGIN = 32 * MIB


class FootprintSource(StrEnum):
    """The source of a footprint, the best first."""

    #: Measured in a process with this configuration.
    MEASURED = "measured"
    #: Reported by llama.cpp without allocating.
    DRY_RUN = "dry run"
    #: Computed from the header of the file.
    CLOSED_FORM = "closed form"


@dataclass(frozen=True, slots=True)
class Share:
    """The bytes that are needed on one device, by purpose."""

    #: `HOST`, or the number of a GPU in the order in which the process sees them.
    place: int
    weights: int = 0
    #: Keys, values and states.
    cache: int = 0
    #: Compute buffers of llama.cpp.
    compute: int = 0
    #: Logits and embeddings, in host memory.
    output: int = 0
    #: The rest of the process: the interpreter, the tokenizer, working memory; on a GPU the driver's context.
    process: int = 0
    #: Maximum for the states of parked requests and of stored prefixes.
    parked: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, part) for part in PARTS)


#: The parts of a share, in the order in which they are printed.
PARTS = tuple(field.name for field in fields(Share) if field.name != "place")


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory that a model needs, by device."""

    source: FootprintSource
    shares: tuple[Share, ...]
    #: Safety margin in bytes, by place.
    margins: Mapping[int, int]
    #: Remarks about these figures, as sentences.
    notes: tuple[str, ...] = ()
    #: Bytes of the host's weights that are copied into process memory, because they are repacked.
    copied: int = 0

    def reserved(self) -> dict[int, int]:
        """Returns the bytes to reserve at each place: the total and the margin."""
        return {share.place: share.total + self.margins.get(share.place, 0) for share in self.shares}

    def with_margin_floor(self, floor: float) -> Self:
        """Returns a copy whose margins are at least this part of the total."""
        margins = {
            share.place: max(self.margins.get(share.place, 0), round(share.total * floor)) for share in self.shares
        }
        return replace(self, margins=margins)

    def maximum(self, other: Self) -> Self:
        """Returns for each place the share with the greater total, and the greater margin."""
        others = {share.place: share for share in other.shares}
        shares = tuple(max(share, others.get(share.place, share), key=lambda one: one.total) for share in self.shares)
        margins = {place: max(size, other.margins.get(place, 0)) for place, size in self.margins.items()}
        return replace(self, shares=shares, margins=margins)

    def as_json(self) -> dict[str, Any]:
        """Returns the footprint as plain data."""
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
        """Returns the footprint that `as_json` represents."""
        return cls(
            FootprintSource(given["source"]),
            tuple(Share(**share) for share in given["shares"]),
            {int(place): size for place, size in given["margins"].items()},
            tuple(given["notes"]),
            given["copied"],
        )


def closed_form_margin(share: Share, *, verified: bool) -> int:
    """Returns the margin of a closed form; `verified` says whether its architecture was compared with llama.cpp."""
    if not verified:
        exact = share.weights + share.output
        return max(round(exact * _EXACT + (share.total - exact - share.parked) * _UNVERIFIED), _MIN_MARGIN)
    exact = share.weights + share.cache + share.output
    return max(round(exact * _EXACT + (share.compute + share.process) * _FITTED), _MIN_MARGIN)


def dry_run_margin(share: Share) -> int:
    """Returns the margin of a dry run, in which llama.cpp reports everything except the memory of the process."""
    return max(round(_counted(share) * _EXACT + share.process * _FITTED), _MIN_MARGIN)


def measured_margin(share: Share) -> int:
    """Returns the margin of a measurement."""
    return max(round((share.total - share.parked) * _MEASURED), _MIN_MARGIN)


def _counted(share: Share) -> int:
    """Returns the bytes that llama.cpp reports. The parked bytes are already a maximum, and need no margin."""
    return share.total - share.parked - share.process
