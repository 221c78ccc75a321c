"""
Evaluations: the cases of a dataset, their checks, and what a candidate makes of them.

A dataset is a file of JSON lines. A line has `inputs` (of a workflow) or `request` (of a call in OpenAI's form), and
may have `output` (what was right, or what was said before) and `checks`.

Nothing here reads a clock or a database, or opens a connection.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from app.inference.shadows import comparison
from app.inference.shadows.comparison import PairEvidence, PairSide
from app.kernel.errors import InvalidInput, Problem, StepFailure
from app.workflows.expressions import conditions
from app.workflows.expressions.templates import Scope

#: Most cases of a dataset, checks of a case, and characters of a line.
MAX_CASES, MAX_CHECKS, MAX_LINE = 100_000, 64, 4_000_000

#: The names that checks can use; what they hold is not known before.
_SCOPE = Scope((), (), ("output", "text", "expected", "inputs"), roots=())


@dataclass(frozen=True, slots=True)
class EvaluationCheck:
    """What a right output fulfils: a condition in CEL over `output`, `text`, `expected` and `inputs`."""

    name: str
    that: str


@dataclass(frozen=True, slots=True)
class EvaluationCase:
    """One line of a dataset."""

    id: str
    kind: Literal["inputs", "request"]
    value: Mapping[str, Any]
    #: What was said before, or what is right; None: nothing is known.
    output: Any = None
    checks: tuple[EvaluationCheck, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluatedCase:
    """What a candidate has made of a case."""

    case: EvaluationCase
    #: The id of its run, and why it failed; None: it did not.
    run: str | None
    problem: str | None
    output: Any = None
    tokens_out: int = 0
    #: By name, whether a check holds; None: it could not be evaluated.
    checks: Mapping[str, bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckRate:
    """How many outputs pass a check: of the candidate, and of what was recorded."""

    name: str
    passed: int
    cases: int
    before: int | None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What an evaluation has found."""

    cases: int
    failed: Sequence[EvaluatedCase]
    checks: Sequence[CheckRate]
    #: Beside the recorded outputs, where there are some.
    metrics: Sequence[PairEvidence]

    @property
    def pass_rate(self) -> float:
        """The part of the cases that did not fail and pass all their checks; 1 without cases."""
        return 1 - len(self.failed) / self.cases if self.cases else 1.0


def cases_of(lines: Iterable[str], more: Sequence[EvaluationCheck] = ()) -> list[EvaluationCase]:
    """Return the cases of a dataset; `more` are checks of all of them. Raises InvalidInput with the wrong lines."""
    found: list[EvaluationCase] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        if len(found) >= MAX_CASES:
            problems.append(Problem(where, "the dataset is too long", f"at most {MAX_CASES} cases"))
            break
        try:
            found.append(_case(line, where, more))
        except InvalidInput as error:
            problems += error.problems
            if len(problems) >= 20:
                break
    if problems:
        raise InvalidInput(problems, "dataset")
    return found


def checks_of(given: Any, where: str = "checks") -> tuple[EvaluationCheck, ...]:
    """Return the checks of a list. Raises InvalidInput."""
    accepted = f"a list of at most {MAX_CHECKS} objects with name and that, a condition in CEL"
    if not isinstance(given, list) or len(given) > MAX_CHECKS:
        raise InvalidInput([Problem(where, "it is no list of checks", accepted)], "dataset")
    found = []
    for at, one in enumerate(given):
        texts = [one.get("name"), one.get("that")] if isinstance(one, Mapping) and set(one) == {"name", "that"} else []
        if len(texts) != 2 or not all(isinstance(text, str) and 0 < len(text) <= 10_000 for text in texts):
            raise InvalidInput([Problem(f"{where}[{at}]", "it is no check", accepted)], "dataset")
        problems = conditions.check(str(texts[1]), f"{where}[{at}].that", _SCOPE)
        if problems:
            raise InvalidInput(problems, "dataset")
        found.append(EvaluationCheck(str(texts[0]), str(texts[1])))
    return tuple(found)


def _case(line: str, where: str, more: Sequence[EvaluationCheck]) -> EvaluationCase:
    accepted = "a JSON object with inputs or request, and if known id, output and checks"
    if len(line) > MAX_LINE:
        raise InvalidInput([Problem(where, "it is too long", f"at most {MAX_LINE} characters")], "dataset")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput([Problem(where, f"it is no JSON: {error}", accepted)], "dataset") from None
    kinds = [kind for kind in ("inputs", "request") if isinstance(data, dict) and isinstance(data.get(kind), dict)]
    if len(kinds) != 1:
        raise InvalidInput([Problem(where, "it has neither inputs nor request, or both", accepted)], "dataset")
    unknown = sorted(set(data) - {"id", "inputs", "request", "output", "checks"})
    if unknown:
        raise InvalidInput([Problem(f"{where}.{unknown[0]}", "there is no such field", accepted)], "dataset")
    id_ = data.get("id", where)
    if not isinstance(id_, str) or not 0 < len(id_) <= 200:
        raise InvalidInput([Problem(f"{where}.id", "it is no text", "a text of at most 200 characters")], "dataset")
    own = checks_of(data["checks"], f"{where}.checks") if "checks" in data else ()
    kind: Literal["inputs", "request"] = "inputs" if kinds == ["inputs"] else "request"
    return EvaluationCase(id_, kind, data[kind], data.get("output"), (*own, *more))


def checked(case: EvaluationCase, output: Any) -> dict[str, bool | None]:
    """Return whether the checks of a case hold for an output; a check that cannot be evaluated does not."""
    text = comparison.side_of_answer(output)[0]
    data = {"output": output, "text": text, "expected": case.output, "inputs": dict(case.value)}
    found: dict[str, bool | None] = {}
    for check in case.checks:
        try:
            found[check.name] = conditions.evaluate_bool(check.that, data)
        except StepFailure:
            found[check.name] = None
    return found


def report_of(done: Sequence[EvaluatedCase], effect: float, alpha: float) -> EvaluationReport:
    """Return what evaluated cases say together."""
    names = dict.fromkeys(check.name for one in done for check in one.case.checks)
    rates = []
    for name in names:
        having = [one for one in done if any(check.name == name for check in one.case.checks)]
        known = [one for one in having if one.case.output is not None]
        before = sum(checked(one.case, one.case.output).get(name) is True for one in known) if known else None
        rates.append(CheckRate(name, sum(one.checks.get(name) is True for one in having), len(having), before))
    failed = [one for one in done if one.problem is not None or not all(one.checks.values())]
    pairs = [
        comparison.compared(
            _side(one.case.output), None if one.problem is not None else _side(one.output), one.case.value, None
        )
        for one in done
        if one.case.output is not None
    ]
    return EvaluationReport(len(done), failed, rates, comparison.evidence_of(pairs, effect, alpha))


def _side(output: Any) -> PairSide:
    """What is known of an output alone: its text, its tools and, in OpenAI's form, its tokens."""
    text, tools, finish = comparison.side_of_answer(output)
    usage = output.get("usage") if isinstance(output, Mapping) else None
    counts = usage if isinstance(usage, Mapping) else {}
    tokens = [counts.get(name) for name in ("prompt_tokens", "completion_tokens")]
    tokens_in, tokens_out = (one if isinstance(one, int) else 0 for one in tokens)
    return PairSide(text, tools, tokens_in, tokens_out, None, None, None, None, finish)
