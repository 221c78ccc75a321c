"""
The pages of the API for people: `/` with links, and `/docs` with Swagger UI.

Everything that a page needs comes from this server, so that it works off-line and tells nobody that it was opened.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from app.api.callers import OPEN

#: Where the files of Swagger UI are served.
ASSETS = "/docs/assets"
#: The links of `/`: path by title.
LINKS = {
    "dashboard": "/ui",
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "health": "/healthz",
    "readiness": "/readyz",
    "metrics": "/metrics",
    "runs": "/v1/runs",
    "workflows": "/v1/workflows",
    "models": "/v1/catalog",
    "fleet": "/v1/fleet",
}
#: A page loads nothing from other servers. Swagger UI has inline scripts, styles and images.
_POLICY = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
}


def add(app: FastAPI) -> None:
    """Add the pages to an application that has no documentation of its own."""
    app.mount(ASSETS, StaticFiles(packages=[("fastapi_swagger", "resources")]))

    @app.get("/docs", include_in_schema=False, dependencies=[OPEN])
    def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{ASSETS}/favicon-32x32.png",
            # The badge of a validator would be loaded from its own server.
            swagger_ui_parameters={"validatorUrl": None},
        )
        page.headers.update(_POLICY)
        return page

    @app.api_route(
        "/", methods=["GET", "HEAD"], include_in_schema=False, dependencies=[OPEN]
    )  # Ollama's command line begins with HEAD
    def root(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse({"name": app.title, "version": app.version, "links": LINKS})
        listed = "".join(f'<li><a href="{path}">{title}</a></li>' for title, path in LINKS.items())
        body = f"<!doctype html><title>{app.title}</title><h1>{app.title} {app.version}</h1><ul>{listed}</ul>"
        return HTMLResponse(body, headers=_POLICY)
