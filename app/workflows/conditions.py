"""Scratch until the real one comes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cel_expr_python import cel

from app.kernel.errors import FailureReason, Problem, StepFailure
from app.workflows.expressions import Scope


def check(expression: str, where: str, scope: Scope, *, wanted: str = "bool") -> list[Problem]:
    problems = []
    for root, name in re.findall(r"\b(inputs|steps)\.(\w+)", expression):
        known = scope.inputs if root == "inputs" else scope.steps
        if name not in known:
            problems.append(Problem(where, f"'{root}.{name}' names nothing", scope.names()))
    return problems


def evaluate(expression: str, data: Mapping[str, Any]) -> Any:
    env = cel.NewEnv(variables=dict.fromkeys(data, cel.Type.DYN))
    try:
        return env.compile(expression).eval(data=dict(data)).plain_value()
    except Exception as error:
        raise StepFailure(FailureReason.TEMPLATE_ERROR, str(error)) from None


def evaluate_bool(expression: str, data: Mapping[str, Any]) -> bool:
    value = evaluate(expression, data)
    if not isinstance(value, bool):
        raise StepFailure(FailureReason.TEMPLATE_ERROR, f"{expression} gives no truth value")
    return value
