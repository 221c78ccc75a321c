"""
The comparison of pairs: what the original and the candidate did, side by side, and what many pairs say together.

Each metric of a pair is one difference, so pairs are compared with themselves: what makes a request hard is the same
for both. What is said of the mean difference holds however often one looks (`app.inference.splits.evidence`).

Nothing here reads a clock or a database.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from app.inference.splits import evidence
from app.inference.splits.evidence import SplitVerdict, VariantSample
from app.json_schema import validation


class PairMetric(StrEnum):
    """What is compared of a pair; the difference is that of the candidate."""

    #: Whether it failed; the original never did.
    ERROR = "error"
    #: Whether the text has the form that the request asks for.
    VALID = "valid"
    #: Whether the same tools were called, with the same arguments.
    SAME_TOOLS = "same_tools"
    #: 1 where the judge prefers the candidate in both orders, -1 where it prefers the original.
    JUDGE = "judge"
    #: The mean score of verifiers in the two runs.
    SCORE = "score"
    #: Logarithms of ratios.
    LENGTH = "length"
    TOKENS_OUT = "tokens_out"
    SECONDS = "seconds"
    FIRST_TOKEN = "first_token"  # noqa: S105 no password
    COST = "cost"

    @property
    def is_logarithmic(self) -> bool:
        """Whether the difference is relative."""
        return self in (
            PairMetric.LENGTH,
            PairMetric.TOKENS_OUT,
            PairMetric.SECONDS,
            PairMetric.FIRST_TOKEN,
            PairMetric.COST,
        )

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better. Of lengths neither is: there `better` says that it is shorter."""
        return self in (PairMetric.VALID, PairMetric.SAME_TOOLS, PairMetric.JUDGE, PairMetric.SCORE)


class JudgePreference(StrEnum):
    """What a judge that was asked in both orders prefers."""

    CANDIDATE = "candidate"
    ORIGINAL = "original"
    TIE = "tie"
    #: It named the same place twice, whatever was there.
    POSITION_A = "position_a"
    POSITION_B = "position_b"
    #: A tie in one order, and not in the other.
    UNSURE = "unsure"


@dataclass(frozen=True, slots=True)
class PairSide:
    """What one of the two did."""

    text: str
    tools: Sequence[tuple[str, str]]
    tokens_in: int
    tokens_out: int
    #: From the begin of the attempt that succeeded to its end: waiting is not compared, the candidate waits by design.
    seconds: float | None
    first_token: float | None
    cost: float | None
    score: float | None
    finish: str | None


def side_of_answer(document: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """Return the text, the calls of tools and the reason of the end of an answer of OpenAI's form, or of any output."""
    choices = document.get("choices") if isinstance(document, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        return (document if isinstance(document, str) else json.dumps(document, ensure_ascii=False), [], None)
    message = choices[0].get("message") or {}
    text = message.get("content") if message else choices[0].get("text")
    tools = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", {})
        tools.append((str(function.get("name")), _canonical(function.get("arguments"))))
    return (text or "", tools, choices[0].get("finish_reason"))


def is_valid(text: str, request: Any) -> bool | None:
    """Return whether a text has the form that its request asks for; None where it asks for none."""
    form = request.get("response_format") if isinstance(request, Mapping) else None
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind not in ("json_object", "json_schema"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if kind == "json_object":
        return isinstance(value, dict)
    assert isinstance(form, Mapping)
    described = form.get("json_schema")
    schema = described.get("schema", {}) if isinstance(described, Mapping) else {}
    return validation.conforms(schema, value)


def preference(first: str | None, second: str | None) -> JudgePreference | None:
    """Return what a judge prefers: first the original was A, then the candidate was. None without both answers."""
    if first is None or second is None:
        return None
    match first, second:
        case "tie", "tie":
            return JudgePreference.TIE
        case "A", "B":
            return JudgePreference.ORIGINAL
        case "B", "A":
            return JudgePreference.CANDIDATE
        case "A", "A":
            return JudgePreference.POSITION_A
        case "B", "B":
            return JudgePreference.POSITION_B
    return JudgePreference.UNSURE


def cosine(vectors: Any) -> float | None:
    """Return how near two vectors are, from -1 to 1; None when there are not two."""
    if not isinstance(vectors, Sequence) or len(vectors) != 2:
        return None
    one, other = vectors
    size = math.sqrt(math.fsum(x * x for x in one)) * math.sqrt(math.fsum(x * x for x in other))
    return math.fsum(x * y for x, y in zip(one, other, strict=True)) / size if size else None


def compared(
    original: PairSide, candidate: PairSide | None, request: Any, judged: JudgePreference | None
) -> dict[str, float]:
    """Return the differences of a pair by metric. `candidate` is None when it failed."""
    found: dict[str, float] = {PairMetric.ERROR: float(candidate is None)}
    if candidate is None:
        return found
    valid = is_valid(original.text, request), is_valid(candidate.text, request)
    if valid[0] is not None and valid[1] is not None:
        found[PairMetric.VALID] = float(valid[1]) - float(valid[0])
    if original.tools or candidate.tools:
        # A disagreement counts against the candidate: 0 is the best that it can be.
        found[PairMetric.SAME_TOOLS] = float(list(original.tools) == list(candidate.tools)) - 1.0
    if judged is not None:
        found[PairMetric.JUDGE] = {JudgePreference.CANDIDATE: 1.0, JudgePreference.ORIGINAL: -1.0}.get(judged, 0.0)
    if original.score is not None and candidate.score is not None:
        found[PairMetric.SCORE] = candidate.score - original.score
    ratios = (
        (PairMetric.LENGTH, len(original.text) or None, len(candidate.text) or None),
        (PairMetric.TOKENS_OUT, original.tokens_out, candidate.tokens_out),
        (PairMetric.SECONDS, original.seconds, candidate.seconds),
        (PairMetric.FIRST_TOKEN, original.first_token, candidate.first_token),
        (PairMetric.COST, original.cost, candidate.cost),
    )
    for metric, before, after in ratios:
        if before and after:
            found[metric] = math.log(after / before)
    return found


@dataclass(frozen=True, slots=True)
class PairEvidence:
    """What all pairs say of one metric."""

    metric: PairMetric
    pairs: int
    #: The mean difference and its interval; of relative metrics as a part of the original's.
    difference: float
    low: float | None
    high: float | None
    verdict: SplitVerdict


def evidence_of(pairs: Iterable[Mapping[str, float]], effect: float, alpha: float) -> list[PairEvidence]:
    """Return what many pairs say, by metric; metrics without a pair are left out."""
    listed = list(pairs)
    found = []
    for metric in PairMetric:
        values = [one[metric] for one in listed if metric in one]
        if not values:
            continue
        smallest = math.log1p(effect) if metric.is_logarithmic else effect
        sample = VariantSample.of_values(values, is_rate=metric is PairMetric.ERROR)
        one = evidence.of_mean(sample, smallest, alpha)
        assert one.difference is not None, "there are values"
        found.append(
            PairEvidence(
                metric,
                len(values),
                _shown(metric, one.difference) or 0.0,
                _shown(metric, one.low),
                _shown(metric, one.high),
                one.verdict(smallest, higher_is_better=metric.higher_is_better),
            )
        )
    return found


def _shown(metric: PairMetric, value: float) -> float | None:
    if math.isinf(value):
        return None
    if metric.is_logarithmic:
        return None if value > 20 else math.expm1(value)
    return value


def _canonical(arguments: Any) -> str:
    """Arguments of a tool in one form, whatever the order of their names; what is no JSON stays as it is."""
    if not isinstance(arguments, str):
        return json.dumps(arguments, sort_keys=True)
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments
