"""
What was spent: sums of what attempts cost, and what their tokens would cost elsewhere.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from app.catalog.serving.remote_options import TokenPrices
from app.kernel.errors import InvalidInput, Problem

#: By what sums can be divided, besides `label:NAME`.
GROUPS = ("model", "namespace", "workflow", "day")
_LABEL = re.compile(r"label:([^\x00]{1,200})", re.DOTALL)
_ACCEPTED = f"{', '.join(GROUPS)}, or label:NAME"


@dataclass(frozen=True, slots=True)
class CostGroup:
    """What sums are divided by: one of `GROUPS`, or the label of a run."""

    name: str
    label: str | None = None

    @classmethod
    def parse(cls, given: str) -> CostGroup:
        """Raises InvalidInput."""
        if given in GROUPS:
            return cls(given)
        if found := _LABEL.fullmatch(given):
            return cls("label", found[1])
        raise InvalidInput([Problem("query.by", f"{given[:60]!r} is nothing to divide costs by", _ACCEPTED)], "query")


@dataclass(frozen=True, slots=True)
class Spending:
    """What some attempts did and cost."""

    attempts: int = 0
    #: Of these, those whose cost is not known.
    unpriced: int = 0
    #: Of these, those that have told no tokens.
    untold: int = 0
    tokens_in: int = 0
    #: Of the tokens read, those that were computed before.
    tokens_cached: int = 0
    tokens_out: int = 0
    #: Time of devices, in microseconds.
    device_us: int = 0
    cost: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What the recorded tokens would have cost on another model."""

    #: None where it cannot be known.
    amount: Decimal | None
    #: With the recorded cached tokens at the price of cached ones; None where that makes no difference, or is unknown.
    with_cache: Decimal | None
    #: What was assumed, or why there is no amount; a sentence each.
    assumed: tuple[str, ...]


def on_server(work: Spending, prices: TokenPrices) -> CostEstimate:
    """Return what the tokens of this work cost at a server."""
    assumed = (
        "the same tokens: the other model reads and writes as many, though its tokenizer and its answers differ",
        "no token is cached there; `with_cache` takes those for cached that were cached here",
    )
    amount = prices.of(work.tokens_in, 0, work.tokens_out)
    cached = prices.of(work.tokens_in, work.tokens_cached, work.tokens_out)
    return CostEstimate(amount, None if cached == amount else cached, (*assumed, *_lacking(work)))


def on_devices(work: Spending, measured: Spending) -> CostEstimate:
    """Return what the tokens of this work cost at the rate that another model's own work was measured to have."""
    computed = measured.tokens_in - measured.tokens_cached + measured.tokens_out
    if measured.attempts == measured.unpriced or computed <= 0:
        reason = "it has neither prices of tokens nor attempts with a known cost from which a rate follows"
        return CostEstimate(None, None, (reason,))
    rate = measured.cost / computed
    known = measured.attempts - measured.unpriced
    assumed = (
        f"a token, read or written, costs what one of its own did: {rate:.3g}, of {known} attempts, computed ones only",
        "its own work had the same share of long prompts, and as many requests at the same time",
        "no token is cached there",
        *_lacking(work),
    )
    return CostEstimate(rate * (work.tokens_in + work.tokens_out), None, assumed)


def _lacking(work: Spending) -> list[str]:
    if not work.untold:
        return []
    return [f"{work.untold} of {work.attempts} attempts have told no tokens, and count for nothing"]
