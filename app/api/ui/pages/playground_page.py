"""The page of the playground. What it does, its script does with the API."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import HTMLResponse

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, requires
from app.api.openai import models as models_resource
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.ui.rendering import render

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.SUBMIT)])

_Model = Annotated[str, Query(max_length=200)]


@router.get("/playground")
def playground(
    request: Request, caller: InjectedCaller, services: InjectedServices, model: _Model = "", second: _Model = ""
) -> HTMLResponse:
    """A chat with one model or two."""
    able = [one for one in services.catalog.models if "chat" in one.use_cases]
    served = {one.id for one in models_resource.page(services, caller).data if one.state == "resident"}
    models = sorted(
        ({"name": one.name, "served": one.name in served} for one in able), key=lambda one: not one["served"]
    )
    return render(
        request,
        caller,
        "playground.html",
        title="Playground",
        models=models,
        chosen=model or (models[0]["name"] if models else ""),
        other=second,
    )
