"""
Verifiers: each returns the checks of an output.

A check that cannot be evaluated has failed, with the reason: an output without the field that a condition reads is
wrong. Only what concerns every output alike raises: sources that are no texts, tests that are no list, code that may
not be run here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from app import json_schema
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.expressions import conditions
from app.workflows.language.verification import (
    ChecksVerifier,
    CodeVerifier,
    GroundingVerifier,
    SchemaVerifier,
    Verifier,
    VoteVerifier,
)
from workers.refinement import grounding, outputs
from workers.refinement.code_tests import CodeRun
from workers.refinement.grounding import GroundingSources
from workers.refinement.outputs import NoValue
from workers.refinement.verdict import CheckResult, Verdicts, VerifierVerdict

#: Runs a code with tests: code, tests, seconds, mebibytes.
RunCode = Callable[[str, Sequence[str], float, int], CodeRun]

#: Most deviations from a schema that are reported, most tests of one code, most samples of a vote.
_MAX_DEVIATIONS, _MAX_TESTS, _MAX_SAMPLES = 10, 64, 64
_MAX_TEST = 20_000


@dataclass(frozen=True, slots=True)
class CandidateOutput:
    """An output of a model."""

    #: The value that is checked; None when there is none.
    value: Any
    text: str
    #: Why there is no value.
    error: str = ""

    @property
    def exists(self) -> bool:
        """Whether there is a value."""
        return not self.error


@dataclass(slots=True)
class VerifierInputs:
    """What verifiers read beside the output."""

    #: The names of expressions.
    data: Mapping[str, Any]
    run_code: RunCode
    #: The names of the expression of samples, which are those of the step.
    own: Mapping[str, Any]
    _sources: dict[str, GroundingSources] = field(default_factory=dict)

    def of(self, output: CandidateOutput) -> Mapping[str, Any]:
        """The names of expressions over an output."""
        return {**self.data, "output": output.value, "text": output.text}

    def sources(self, expression: str, output: CandidateOutput) -> GroundingSources:
        """The texts that an expression returns. Raises StepFailure."""
        if expression not in self._sources:
            found = conditions.evaluate(expression, self.of(output))
            texts = [found] if isinstance(found, str) else found
            if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
                raise _unusable("'sources' must be a text or a list of texts")
            if sum(map(len, texts)) > grounding.MAX_SOURCES:
                raise _unusable(f"the sources have more than {grounding.MAX_SOURCES} characters")
            self._sources[expression] = GroundingSources(texts)
        return self._sources[expression]


def candidate(value: Any, *, as_json: bool, error: str = "") -> CandidateOutput:
    """Return the output of a step as it is checked."""
    if value is None and error:
        return CandidateOutput(None, "", error)
    text = outputs.written(value)
    if as_json and isinstance(value, str):
        try:
            return CandidateOutput(outputs.parsed(value), text)
        except NoValue as problem:
            return CandidateOutput(None, text, str(problem))
    return CandidateOutput(value, text)


def verify(output: CandidateOutput, verifiers: Sequence[Verifier], inputs: VerifierInputs) -> Verdicts:
    """Return what the verifiers find in an output. Raises StepFailure, CodeTestsRefused."""
    if not output.exists:
        # Every verifier has failed: what does not exist has nothing right.
        failed = [CheckResult("output", False, message=output.error)]
        return Verdicts([VerifierVerdict(one.kind, failed, one.weight) for one in verifiers])
    return Verdicts([VerifierVerdict(one.kind, _checks(one, output, inputs), one.weight) for one in verifiers])


def _checks(verifier: Verifier, output: CandidateOutput, inputs: VerifierInputs) -> list[CheckResult]:
    match verifier:
        case SchemaVerifier():
            return _schema(verifier, output)
        case ChecksVerifier():
            return _conditions(verifier, inputs.of(output))
        case CodeVerifier():
            return _code(verifier, output, inputs)
        case GroundingVerifier():
            return _grounding(verifier, output, inputs)
        case VoteVerifier():
            return _vote(verifier, output, inputs)


def _schema(verifier: SchemaVerifier, output: CandidateOutput) -> list[CheckResult]:
    found = list(islice(json_schema.deviations(verifier.schema_, output.value), _MAX_DEVIATIONS))
    message = "; ".join(f"{one.where.lstrip('.') or 'the value'}: {one.message}" for one in found)
    return [CheckResult("schema", not found, message=message)]


def _conditions(verifier: ChecksVerifier, data: Mapping[str, Any]) -> list[CheckResult]:
    checks = []
    for one in verifier.checks:
        message = one.message or f"{one.name}: {one.that}"
        try:
            passed = conditions.evaluate_bool(one.that, data)
        except StepFailure as error:
            passed, message = False, f"{message} ({error.message})"
        checks.append(CheckResult(one.name, passed, one.weight, "" if passed else message))
    return checks


def _code(verifier: CodeVerifier, output: CandidateOutput, inputs: VerifierInputs) -> list[CheckResult]:
    tests = _tests(verifier, inputs.of(output))
    code = outputs.fenced(output.text)
    run = inputs.run_code(code, [test for _, test, _ in tests], verifier.timeout.total_seconds(), verifier.memory_mb)
    return [
        CheckResult(name, error is None, weight, "" if error is None else f"the test {name!r} fails: {error}")
        for (name, _, weight), error in zip(tests, run.errors, strict=True)
    ]


def _tests(verifier: CodeVerifier, data: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    if not isinstance(verifier.tests, str):
        return [(test.name, test.code, test.weight) for test in verifier.tests]
    found = conditions.evaluate(verifier.tests, data, result_type="list")
    if not 1 <= len(found) <= _MAX_TESTS:
        raise _unusable(f"'tests' has {len(found)} tests; 1 to {_MAX_TESTS} are accepted")
    tests = []
    for number, one in enumerate(found):
        code = one if isinstance(one, str) else one.get("code") if isinstance(one, dict) else None
        if not isinstance(code, str) or len(code) > _MAX_TEST:
            raise _unusable(f"tests[{number}] has no 'code' of up to {_MAX_TEST} characters")
        name = one.get("name") if isinstance(one, dict) else None
        tests.append((str(name)[:100] if name else f"test {number + 1}", code, 1.0))
    return tests


def _grounding(verifier: GroundingVerifier, output: CandidateOutput, inputs: VerifierInputs) -> list[CheckResult]:
    found = grounding.grounded(
        output.value,
        inputs.sources(verifier.sources, output),
        verifier.what,
        fields=verifier.fields,
        ignore=verifier.ignore,
        support=verifier.support,
    )
    return [CheckResult(one.name, one.found, message="" if one.found else one.message) for one in found]


def _vote(verifier: VoteVerifier, output: CandidateOutput, inputs: VerifierInputs) -> list[CheckResult]:
    assert isinstance(verifier.samples, str), "a number of samples became an expression when they were drawn"
    samples = values_of(conditions.evaluate(verifier.samples, inputs.own))[:_MAX_SAMPLES]
    if not samples:
        return [CheckResult("agreement", False, message="there are no samples to compare it with")]
    own = outputs.key_of(output.value, verifier.fields)
    as_json = not isinstance(output.value, str)
    equal = sum(
        other.exists and outputs.key_of(other.value, verifier.fields) == own
        for other in (candidate(one, as_json=as_json) for one in samples)
    )
    passed = equal >= verifier.agree * len(samples)
    message = f"only {equal} of {len(samples)} independent answers agree with this one"
    return [CheckResult("agreement", passed, message="" if passed else message)]


def values_of(found: Any) -> list[Any]:
    """Return the outputs in what a generate step has written: a list of them, its `choices`, or the one."""
    if isinstance(found, Mapping) and isinstance(found.get("choices"), list):
        return [one.get("value", one.get("text")) for one in found["choices"] if isinstance(one, Mapping)]
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _unusable(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)
