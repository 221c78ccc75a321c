"""All routes of the dashboard, and the files of its pages."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from starlette.staticfiles import StaticFiles

from app.api.ui import session
from app.api.ui.pages import (
    admin_pages,
    batch_pages,
    fleet_pages,
    governance_pages,
    handoff_pages,
    memory_pages,
    overview_pages,
    playground_page,
    run_pages,
    trends_page,
    trial_pages,
    workflow_pages,
)
from app.api.ui.rendering import ASSETS, STATIC

ROUTERS = (
    session.router,
    overview_pages.router,
    run_pages.router,
    fleet_pages.router,
    workflow_pages.router,
    playground_page.router,
    memory_pages.router,
    batch_pages.router,
    handoff_pages.router,
    trial_pages.router,
    governance_pages.router,
    trends_page.router,
    admin_pages.router,
)


class _Assets(StaticFiles):
    """Files that a browser keeps, and asks about before it uses them: modules import each other without a mark."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        answer = super().file_response(*args, **options)
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def add_files(app: FastAPI) -> None:
    """Serve the scripts and styles of pages."""
    app.mount(ASSETS, _Assets(directory=STATIC))
