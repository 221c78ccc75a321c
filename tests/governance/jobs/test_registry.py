"""The list of scheduled jobs: every entry can be read by all that use it."""

from __future__ import annotations

import re
from datetime import timedelta

from app.governance.jobs.registry import BY_NAME, JOBS
from app.kernel.settings import Settings
from workers.messaging.timetable import schedule


def test_every_job_has_a_name_a_description_and_an_interval_in_the_settings() -> None:
    settings = Settings()
    assert len(BY_NAME) == len(JOBS) == len({job.task for job in JOBS})
    for job in JOBS:
        assert re.fullmatch(r"[a-z][a-z_]{1,40}", job.name)
        assert job.description
        assert not job.description.endswith(".")
        assert job.every(settings) > timedelta(0)


def test_a_job_without_what_it_needs_is_not_triggered() -> None:
    assert "context_folder" not in schedule(Settings())
    assert schedule(Settings())["sweep"]["schedule"] == Settings().runs.sweep_every
