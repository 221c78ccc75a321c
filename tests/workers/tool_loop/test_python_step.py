"""Functions of `python` steps: shipped ones in processes of their own, with bounded time and memory."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.kernel.errors import FailureReason, StepFailure
from app.workflows import registry
from app.workflows.language.python_fields import PythonFields
from app.workflows.language.steps import work_of
from benchmarks import real_estate_data
from tests.workflows.conftest import StepWorker
from workers.tool_loop import python_program, python_tools

MINUTE = timedelta(minutes=1)


def never(_: Callable[[], None]) -> None:
    """Nothing stops the work."""


def value(tool: str, arguments: dict[str, Any], memory_mb: int = 1_024) -> Any:
    return python_tools.value(tool, arguments, "run/a", on_stop=never, timeout=MINUTE, memory_mb=memory_mb)


def test_every_shipped_function_exists_and_describes_itself() -> None:
    for name in python_program.SHIPPED:
        answer = python_program._answer("describe", name, None)
        assert answer["description"], name
        assert answer["parameters"]["properties"], name


def test_the_library_names_shipped_functions_with_their_arguments() -> None:
    steps = [
        (name, work_of(step))
        for name, version in registry.shipped().items()
        for step in version.definition.all_steps()
        if isinstance(work_of(step), PythonFields)
    ]
    assert len(steps) >= 8
    for name, step in steps:
        assert isinstance(step, PythonFields)
        parameters = python_program._answer("describe", step.tool, None)["parameters"]
        assert set(step.arguments) <= set(parameters["properties"]), (name, step.tool)
        assert set(parameters.get("required", [])) <= set(step.arguments), (name, step.tool)


def test_what_a_function_refuses_names_the_field() -> None:
    with pytest.raises(StepFailure, match="series: it spans 1 months; accepted: 24 to 1200") as found:
        value("real_estate_forecast", {"series": "date,value\n2020-01-01,5\n"})
    assert found.value.reason is FailureReason.INVALID_REQUEST
    with pytest.raises(StepFailure, match="horizon: Input should be less than or equal to 36") as found:
        value("real_estate_forecast", {"series": "", "horizon": 37})
    assert found.value.reason is FailureReason.INVALID_REQUEST


def test_a_function_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(StepFailure, match="real_estate_value") as found:
        value("real_estate_guess", {})
    assert found.value.reason is FailureReason.INVALID_REQUEST


def test_a_pdf_that_expands_to_gigabytes_costs_a_process_and_not_the_worker() -> None:
    packed = zlib.compress(b"(a) Tj " * 20_000_000, 9)
    whole = real_estate_data.pdf([["MARK"]])
    start, end = whole.index(b"<< /Length"), whole.index(b"endstream")
    stream = b"<< /Length %d /Filter /FlateDecode >>\nstream\n" % len(packed) + packed + b"\n"
    bomb = whole[:start] + stream + whole[end:]
    with pytest.raises(StepFailure) as found:
        value("real_estate_read_document", {"pdf": base64.b64encode(bomb).decode()}, memory_mb=512)
    assert found.value.reason in (FailureReason.INVALID_REQUEST, FailureReason.INTERNAL)


def test_a_python_step_records_the_result_and_its_expressions_are_evaluated(worker: StepWorker, tmp_path: Path) -> None:
    run_id = worker.submit(
        """
        workflow: langs
        inputs: {text: {type: string}}
        steps:
          - id: checked
            kind: python
            tool: real_estate_check_text
            arguments: {text: inputs.text, facts: "['The price is ' + '5,000']", least: "1"}
        outputs: {checked: steps.checked.output}
        """,
        text="It costs 5000, or 7.",
    )
    worker.work(run_id)

    assert worker.run(run_id).output == {"checked": {"passed": False, "problems": ["7 is in no fact"]}}


@pytest.fixture
def worker(runs: Any) -> StepWorker:
    return StepWorker(runs)
