"""The check of schedule documents: each problem has its place and a remedy."""

from __future__ import annotations

import pytest

from app.kernel.errors import InvalidInput
from app.workflows.schedules import check

GOOD = """\
schedule: nightly
workflow: digest
cron: "30 2 * * 1-5"
timezone: Europe/Berlin
inputs: {day: "{{ fire.date }}"}
catch_up: 2h
"""

#: The field after which a line is replaced, the new line, the path of the problem, its line, and parts of the message.
WRONG = [
    ("cron:", 'cron: "61 2 * * *"', "cron", 3, ["minute '61'", "0-59"]),
    ("cron:", 'cron: "0 25 * * *"', "cron", 3, ["hour '25'", "0-23"]),
    ("cron:", 'cron: "0 0 31 2 *"', "cron", 3, ["day-of-month '31'"]),
    ("cron:", 'cron: "0 0 * 13 *"', "cron", 3, ["month '13'", "JAN-DEC"]),
    ("cron:", 'cron: "0 0 * * FRYDAY"', "cron", 3, ["day-of-week 'FRYDAY'"]),
    ("cron:", 'cron: "0 0 0 * * *"', "cron", 3, ["five fields", "@daily"]),
    ("cron:", 'cron: "@reboot"', "cron", 3, ["five fields"]),
    ("cron:", f'cron: "{"9" * 5000} * * * *"', "cron", 3, ["five fields"]),
    ("cron:", "cron: 5", "cron", 3, ["5: Input should be a valid string"]),
    ("cron:", "every: soon", "every", 3, ["'soon' is not a duration", "15s"]),
    ("cron:", "every: 500ms", "every", 3, ["whole number of seconds"]),
    ("cron:", "every: 0", "every", 3, ["at least one"]),
    ("cron:", "description: never", "", 1, ["either 'cron' or 'every'"]),
    ("inputs:", "every: 5m", "", 1, ["either 'cron' or 'every'"]),
    ("timezone:", "timezone: Berlin", "timezone", 4, ["'Berlin'", "did you mean 'Europe/Berlin'?"]),
    ("timezone:", "timezone: Europe/Berln", "timezone", 4, ["did you mean 'Europe/Berlin'?"]),
    ("timezone:", "timezone: ../UTC", "timezone", 4, ["time zone is unknown"]),
    ("timezone:", "timezone: Europe", "timezone", 4, ["time zone is unknown"]),
    ("timezone:", "timezone: right/Europe/Berlin", "timezone", 4, ["time zone is unknown"]),
    ("timezone:", "timezone: localtime", "timezone", 4, ["time zone is unknown"]),
    ("catch_up:", "catch_up: 1s", "catch_up.within", 6, ["'1s': Input should be greater than or equal to 10 seconds"]),
    ("catch_up:", "catch_up: {within: 1h, run: all}", "catch_up.run", 6, ["unknown field", "did you mean 'runs'?"]),
    ("catch_up:", "catch_up: {runs: most}", "catch_up.runs", 6, ["'latest' or 'all'"]),
    ("catch_up:", "catch_up: {limit: 5}", "catch_up.limit", 6, ["runs: all"]),
    ("catch_up:", "catch_up: [1h]", "catch_up", 6, ["mapping"]),
    ("catch_up:", "overlap: wait", "overlap", 6, ["'skip', 'queue', 'cancel_running' or 'allow'"]),
    ("catch_up:", "jitter: -5s", "jitter", 6, ["'-5s' is not a duration"]),
    ("catch_up:", "start: tomorrow", "start", 6, ["'tomorrow'", "2026-11-21T02:30"]),
    ("catch_up:", "start: 2026-01-01T00:00:00.5", "start", 6, ["whole seconds"]),
    ("catch_up:", "{start: 2026-02-01", "", 6, ["neither YAML nor JSON"]),
    ("catch_up:", "start: 2026-02-01\nend: 2026-01-31T22:30:00-00:30", "end", 7, ["not after the start"]),
    ("catch_up:", "overlaps: skip", "overlaps", 6, ["unknown field", "did you mean 'overlap'?"]),
    ("catch_up:", "priority: urgent", "priority", 6, ["'interactive', 'standard' or 'batch'"]),
    ("catch_up:", "version: -1", "version", 6, ["greater than or equal to 0"]),
    ("catch_up:", "labels: {team: 7}", "labels.team", 6, ["valid string"]),
    ("workflow:", "catch_up: 3h", "catch_up", 6, ["duplicate key"]),
    ("workflow:", "description: d", "workflow", 1, ["missing"]),
    ("schedule:", "schedule: Nightly Run", "schedule", 1, ["'Nightly Run' is not a schedule name", "hyphens"]),
]


def test_a_schedule_is_parsed() -> None:
    schedule = check.parse(GOOD)

    assert schedule.document()["catch_up"] == {"within": "2h"}
    assert (schedule.overlap, schedule.catch_up.max_fires) == ("skip", 1)
    assert check.Schedule.model_validate(schedule.document()) == schedule


@pytest.mark.parametrize(
    ("instead_of", "line", "where", "number", "expected"), WRONG, ids=[line[1][:40] for line in WRONG]
)
def test_problems_have_a_field_a_line_and_a_remedy(
    instead_of: str, line: str, where: str, number: int, expected: list[str]
) -> None:
    lines = [line if old.startswith(instead_of) else old for old in GOOD.splitlines()]
    with pytest.raises(InvalidInput) as caught:
        check.parse("\n".join(lines))

    assert caught.value.what == "schedule"
    (problem,) = caught.value.problems
    assert (problem.where, problem.line) == (where, number)
    assert len(str(problem)) < 500
    for part in expected:
        assert part in str(problem)


def test_one_check_reports_all_problems() -> None:
    with pytest.raises(InvalidInput) as caught:
        check.parse("schedule: s\ncron: x\ntimezone: y\noverlap: z\n")
    assert [problem.where for problem in caught.value.problems] == ["workflow", "cron", "timezone", "overlap"]


def test_a_document_must_be_a_mapping() -> None:
    with pytest.raises(InvalidInput, match="mapping of fields"):
        check.parse("- schedule")
