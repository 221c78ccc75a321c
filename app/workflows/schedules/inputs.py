"""The inputs of a fire: the inputs of the schedule, with their templates rendered for the fire."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from app.kernel.errors import InvalidInput, Problem, StepFailure
from app.workflows.expressions import templates
from app.workflows.schedules.schedule import Schedule

_ACCEPTED = "templates over fire.at, fire.date, fire.time, schedule.name; write {{ '{{' }} for braces"


def render(schedule: Schedule, at: datetime) -> dict[str, Any]:
    """Return the inputs of the fire at an instant. Raises InvalidInput with a problem for each failed template."""
    local = at.astimezone(schedule.zone)
    data = {
        "fire": {"at": local.isoformat(timespec="seconds"), "date": f"{local:%Y-%m-%d}", "time": f"{local:%H:%M}"},
        "schedule": {"name": schedule.schedule},
    }
    problems: list[Problem] = []
    rendered = {name: _value(value, f"inputs.{name}", data, problems) for name, value in schedule.inputs.items()}
    if problems:
        raise InvalidInput(problems, "inputs")
    return rendered


def _value(value: Any, where: str, data: Mapping[str, Any], problems: list[Problem]) -> Any:
    match value:
        case str():
            try:
                return templates.render(value, data)
            except StepFailure as error:
                problems.append(Problem(where, error.message, _ACCEPTED))
                return value
        case dict():
            return {key: _value(inner, f"{where}.{key}", data, problems) for key, inner in value.items()}
        case list():
            return [_value(inner, f"{where}[{i}]", data, problems) for i, inner in enumerate(value)]
        case _:
            return value
