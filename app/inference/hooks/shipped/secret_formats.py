"""
The hook `secrets`: keys and tokens in known formats are masked, refused or counted.

Known are keys of AWS, GitHub, GitLab, Google, Slack, Stripe and OpenAI's form, JSON web tokens and private keys in PEM;
on request also long texts that look random. A password that is a word is not found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.inference.hooks.exchange import HookAnswer, HookText, changed
from app.inference.hooks.shipped import scanning
from app.inference.hooks.shipped.scanning import Taken, TimeLimit
from app.kernel.sections.hooks import HookPoint

_FORMATS: Mapping[str, str] = {
    "jwt": r"\beyJ[A-Za-z0-9_\-]{8,}\.eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}",
    "aws": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "github": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
    "gitlab": r"\bglpat-[A-Za-z0-9_\-]{20,}",
    "google": r"\bAIza[0-9A-Za-z_\-]{35}",
    "slack": r"\bxox[abeoprs]-[A-Za-z0-9\-]{10,}",
    "stripe": r"\b[rs]k_live_[0-9A-Za-z]{20,}",
    "openai": r"\bsk-[A-Za-z0-9_\-]{20,}",
}
_BEGIN, _END = (
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----",
    r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----",
)
_RANDOM = r"[A-Za-z0-9+/_\-]{32,}={0,2}"
#: Bits for each character from which a text looks random; a text in hexadecimal has at most 4.
_ENTROPY = 4.2


class SecretOptions(BaseModel):
    """What happens to what is found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["mask", "refuse", "annotate"] = "mask"
    #: Whether long texts that look random count too.
    high_entropy: bool = False


def call(_: HookPoint, texts: list[HookText], options: SecretOptions, __: Any, limit: TimeLimit) -> HookAnswer:
    """Mask, refuse or count. Raises HookLate."""
    counts: dict[str, int] = {}

    def masked(text: str) -> str:
        spans = sorted(_found(text, options, limit))
        for _, _, kind in spans:
            counts[kind] = counts.get(kind, 0) + 1
        return scanning.replaced(text, [(start, end, f"<SECRET:{kind}>") for start, end, kind in spans])

    without = changed(texts, masked)
    found = {f"secret_{kind}": count for kind, count in counts.items()}
    if counts and options.action == "refuse":
        return HookAnswer(refuse=f"the text contains a secret ({', '.join(sorted(counts))})", annotations=found)
    return HookAnswer(texts=without if counts and options.action == "mask" else None, annotations=found)


def _found(text: str, options: SecretOptions, limit: TimeLimit) -> Iterator[tuple[int, int, str]]:
    taken = Taken()
    yield from ((*one, "private_key") for one in taken.merge(list(_private_keys(text, limit))))
    for kind, pattern in _FORMATS.items():
        yield from ((*one, kind) for one in taken.merge(list(scanning.places(pattern, text, limit))))
    if options.high_entropy:
        long = [(a, b) for a, b in scanning.places(_RANDOM, text, limit) if _looks_random(text[a:b])]
        yield from ((*one, "high_entropy") for one in taken.merge(long))


def _private_keys(text: str, limit: TimeLimit) -> Iterator[tuple[int, int]]:
    """From each beginning to the next end; a key without an end goes on to the end of the text."""
    ends = [end for _, end in scanning.places(_END, text, limit)]
    at, free = 0, 0
    for start, begun in scanning.places(_BEGIN, text, limit):
        if start < free:
            continue
        while at < len(ends) and ends[at] < begun:
            at += 1
        free = ends[at] if at < len(ends) else len(text)
        yield start, free


def _looks_random(text: str) -> bool:
    if not (any(map(str.isdigit, text)) and any(map(str.isupper, text)) and any(map(str.islower, text))):
        return False
    counts: dict[str, int] = {}
    for one in text:
        counts[one] = counts.get(one, 0) + 1
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values()) >= _ENTROPY
