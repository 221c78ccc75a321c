"""Logging: static event names, ids as keys, and no secrets."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from app.kernel import log
from app.kernel.sections.servers import LogSettings


def connect(password: str) -> None:
    raise RuntimeError("no connection")


@pytest.mark.parametrize("form", ["json", "columns"])
def test_a_traceback_shows_no_locals(form: str) -> None:
    """Local variables of drivers contain passwords."""
    out = io.StringIO()
    log.configure(LogSettings(format=form), out)  # type: ignore[arg-type] # mypy sees any text
    try:
        connect("sword" + "fish")
    except RuntimeError:
        log.get("t").exception("it_failed")
        logging.getLogger("celery").exception("task raised")

    assert out.getvalue().count("no connection") >= 2
    assert "swordfish" not in out.getvalue()


def test_lines_contain_the_event_and_the_bound_ids() -> None:
    out = io.StringIO()
    log.configure(LogSettings(format="json"), out)
    with structlog.contextvars.bound_contextvars(run_id="r1"):
        log.get("workers.steps").info("step_succeeded", tokens=3)

    line = json.loads(out.getvalue())
    assert (line["event"], line["run_id"], line["tokens"], line["level"]) == ("step_succeeded", "r1", 3, "info")


def test_lines_below_the_level_are_dropped() -> None:
    out = io.StringIO()
    log.configure(LogSettings(level="warning", format="json"), out)
    log.get("t").info("nothing")

    assert out.getvalue() == ""
