"""The pages of trials: splits and shadows, and what each has found."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import HTMLResponse

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.trials import shadows as shadows_resource
from app.api.trials import splits as splits_resource
from app.api.trials.shadows import InjectedShadows, ShadowName
from app.api.trials.splits import InjectedSplits, SplitInPath
from app.api.ui.pages.written import written
from app.api.ui.rendering import render

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ, all_namespaces=True)])

#: Most splits and shadows of the list, and pairs of a shadow's page.
_LISTED, _PAIRS = 50, 50


@router.get("/trials")
def listed(request: Request, caller: InjectedCaller, services: InjectedServices) -> HTMLResponse:
    """Splits and shadows."""
    return render(
        request,
        caller,
        "trials.html",
        title="Trials",
        splits=splits_resource.page(services, _LISTED).splits,
        shadows=shadows_resource.page(services, _LISTED).shadows,
    )


@router.get("/trials/splits/{name}")
def split(
    request: Request, caller: InjectedCaller, services: InjectedServices, name: SplitInPath, splits: InjectedSplits
) -> HTMLResponse:
    """A split, the outcomes of its variants, and what they say."""
    found = splits_resource.get(name, services, splits)
    return render(request, caller, "split.html", title=name, found=found, text=written(found.definition))


@router.get("/trials/shadows/{name}")
def shadow(
    request: Request, caller: InjectedCaller, services: InjectedServices, name: ShadowName, shadows: InjectedShadows
) -> HTMLResponse:
    """A shadow, what its pairs say, and the newest of them."""
    found = shadows_resource.report(name, shadows)
    pairs = shadows_resource.pairs(name, services, shadows, _PAIRS, 0).pairs
    return render(request, caller, "shadow.html", title=name, found=found, pairs=pairs, text=written(found.definition))
