"""Resources: runs, models, workflows and conversations as documents."""

from __future__ import annotations

import json
import re
from urllib.parse import quote, unquote

import mcp_types as types

from app.mcp_server.api import Api, Refused

#: The parts of a URI: what it is, and which one.
_URI = re.compile(r"arriero://(runs|models|workflows|conversations)(?:/([^/?#]{1,300}))?(?:/(output|messages))?")
_JSON = "application/json"
_RECENT = 20

TEMPLATES = (
    ("arriero://runs/{id}", "run", "A run with its steps, their states, errors and outputs"),
    ("arriero://runs/{id}/output", "run_output", "The whole output of a run"),
    ("arriero://models/{name}", "model", "A model of the catalogue"),
    ("arriero://workflows/{name}", "workflow", "A workflow with its definition"),
    ("arriero://conversations/{id}/messages", "conversation", "The last messages of a conversation"),
)


async def listed(api: Api) -> list[types.Resource]:
    """Return the lists, and what is recent of each. Raises Refused."""
    found = [
        _resource(f"arriero://{name}", name, title)
        for name, title in (
            ("runs", "The last runs"),
            ("models", "All models of the catalogue"),
            ("workflows", "All workflows"),
            ("conversations", "The last conversations"),
        )
    ]
    found.extend(
        _resource(f"arriero://runs/{run['id']}", f"run {run['workflow']}", f"{run['state']}, {run['created_at']}")
        for run in (await api.get("/v1/runs", limit=_RECENT))["runs"]
    )
    for model in (await api.get("/v1/catalog"))["models"]:
        name = str(model["name"])
        found.append(_resource(f"arriero://models/{quote(name, safe='')}", name, ", ".join(model["use_cases"])))
    for one in (await api.get("/v1/conversations", limit=_RECENT))["data"]:
        title = str(one.get("title") or one["id"])
        found.append(_resource(f"arriero://conversations/{one['id']}/messages", title, "a conversation"))
    return found


async def read(api: Api, uri: str) -> types.TextResourceContents:
    """Return a resource. Raises Refused."""
    match = _URI.fullmatch(uri)
    if match is None:
        accepted = ", ".join(template for template, _, _ in TEMPLATES)
        raise Refused(f"{uri[:300]!r} is no resource of this server; accepted: {accepted}", status=404)
    kind, name, part = match[1], match[2], match[3]
    key = quote(unquote(name), safe="") if name else ""
    paths = {
        ("runs", False, None): f"/v1/runs?limit={_RECENT}",
        ("models", False, None): "/v1/catalog",
        ("workflows", False, None): "/v1/workflows",
        ("conversations", False, None): f"/v1/conversations?limit={_RECENT}",
        ("runs", True, None): f"/v1/runs/{key}",
        ("runs", True, "output"): f"/v1/runs/{key}/output",
        ("models", True, None): f"/v1/catalog/{key}",
        ("workflows", True, None): f"/v1/workflows/{key}",
        ("conversations", True, None): f"/v1/conversations/{key}",
        ("conversations", True, "messages"): f"/v1/conversations/{key}/messages?order=desc&limit=50",
    }
    path = paths.get((kind, bool(name), part))
    if path is None:
        raise Refused(f"{uri!r} has no part {part!r}", status=404)
    found = await api.get(path)
    return types.TextResourceContents(uri=uri, mime_type=_JSON, text=json.dumps(found, ensure_ascii=False, indent=1))


def templates() -> list[types.ResourceTemplate]:
    """Return the templates of URIs."""
    return [
        types.ResourceTemplate(uri_template=uri, name=name, description=description, mime_type=_JSON)
        for uri, name, description in TEMPLATES
    ]


def _resource(uri: str, name: str, description: str) -> types.Resource:
    return types.Resource(uri=uri, name=name[:200], description=description[:500], mime_type=_JSON)
