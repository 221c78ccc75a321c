"""
A walk over every route: who is let in, and what a caller of one namespace sees of another one.

The routes come from the application. A new one is checked for keys and scopes by itself; one with a parameter or a body
that these tests do not know fails with the name of the table that needs an entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import text

from app.access import key_store, keys
from app.access.callers import LOCAL, KeyScope
from app.access.keys import NewKey
from app.api.callers import Requirement, requirement_of
from app.api.main import serve
from app.api.services import Services
from app.governance.actions.action import parse as parse_actions
from app.governance.actions.execution import Cause
from app.governance.alerts.service import AlertService
from app.governance.costs import budget_store
from app.governance.costs.budget import BudgetPeriod, SpendingBudget
from app.governance.rules import check
from app.governance.rules import store as rule_store
from app.governance.rules.firing import FiringState
from app.kernel import ids
from app.kernel.database import Database
from app.kernel.sections.access import AccessSettings
from app.kernel.sections.governance import AlertSettings
from app.memory.conversations.conversation import NewConversation
from app.memory.conversations.service import Conversations, shown_conversation
from app.memory.recall import storage as recall
from app.memory.recall.passages import NewPassage, SourceKind

#: What FastAPI serves without a route of its own kind: the document, and the files of its page.
PLAIN = {"/openapi.json", "/docs/assets", "/ui/assets"}
#: Paths that anybody may call.
OPEN = {
    *("/", "/docs", "/healthz", "/readyz", "/v1/schemas/workflow", "/ui", "/ui/login", "/ui/logout"),
    *("/.well-known/oauth-protected-resource/mcp", "/v1/hooks/{namespace}/{name}", "/v1/hosts/join"),
}
#: Paths that name or call what all namespaces share: models.
SHARED = {
    *("/v1/signals/{name}", "/v1/catalog/{name}", "/v1/catalog/select", "/v1/models/{name}"),
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/compress"),
}
#: The first parts of paths whose isolation other modules test, because their endpoints need more than a database.
ELSEWHERE = {
    "/v1/responses": "openai/test_responses.py",
    "/v1/files": "openai/test_files_of_namespaces.py",
    "/v1/batches": "openai/test_files_of_namespaces.py",
    "/v1/cache": "openai/test_cache.py",
    "/v1/conversations": "memory/test_conversations.py",
    "/v1/users": "memory/test_deletion.py",
    "/mcp": "../mcp_server/test_http.py",
    "/ui/": "ui/test_dashboard.py",
    "/api/": "ollama/test_ollama.py, which has no paths of namespaces",
}
#: A hand-off to a workflow.
HANDOFF: dict[str, Any] = {
    "handoff": "bhandoff",
    "source": {"kind": "api"},
    "mapping": {"jmespath": "message"},
    "target": {"kind": "workflow", "workflow": "bflow"},
}
#: A text that only things of namespace b have.
MARK = "onlyofb"
#: By the first part of a path, parameters that name something of namespace b, and something that is nowhere.
UNKNOWN = "01a20000-0000-7000-8000-000000000000"
NAMED = {
    "/v1/runs": {"run_id": ("{run}", UNKNOWN), "key": ("wait", "wait"), "name": ("helpful", "helpful")},
    "/v1/workflows": {"name": ("bflow", "nowhere")},
    "/v1/schedules": {"name": ("bnight", "nowhere")},
    "/v1/rules": {"name": ("brule", "nowhere")},
    "/v1/handoffs": {"name": ("bhandoff", "nowhere"), "message_id": ("{message}", UNKNOWN)},
    "/v1/hooks": {"namespace": ("b", "nowhere"), "name": ("bhandoff", "nowhere")},
    "/v1/firings": {"firing_id": ("{firing}", UNKNOWN)},
    "/v1/keys": {"key_id": ("{key}", "0000000000")},
    "/v1/namespaces": {"name": ("b", "nowhere")},
    "/v1/memories": {
        "memory_id": ("{memory}", f"mem_{'0' * 32}"),
        "conversation_id": ("{memory_conversation}", f"conv_{'0' * 32}"),
    },
    "/v1/consolidations": {"consolidation_id": ("{consolidation}", f"cons_{'0' * 32}")},
    "/v1/limits": {"kind": ("key", "key"), "id": ("{key}", "0000000000")},
    "/v1/budgets": {"name": ("bbudget", "nowhere")},
    "/v1/blocks": {"block_id": ("{block}", f"block_{'0' * 32}"), "version": ("1", "1")},
    "/v1/block-templates": {"name": ("btemplate", "nowhere")},
    "/v1/splits": {"name": ("nothing", "nowhere")},
    "/v1/shadows": {"name": ("nothing", "nowhere")},
    "/v1/jobs": {"name": ("sweep", "nothing"), "pass_id": (UNKNOWN, UNKNOWN)},
    "/v1/actions": {"action_id": ("{action}", UNKNOWN)},
    "/v1/alerts": {
        "alert_id": ("{alert}", UNKNOWN),
        "silence_id": ("{silence}", UNKNOWN),
        "notification_id": ("{notification}", UNKNOWN),
        "name": ("bchannel", "nowhere"),
    },
    "/v1/context": {"kind": ("projects", "projects"), "name": ("bdocument", "nowhere")},
}
#: Bodies of requests; the others are sent `{}`.
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/runs/{run_id}/fork"): {"from": "wait"},
    ("POST", "/v1/runs/{run_id}/events"): {"name": "go", "payload": {}},
    ("POST", "/v1/runs"): {"workflow": "bflow"},
    ("POST", "/v1/handoffs/{name}/messages/{message_id}/mend"): {"message": {"text": "mended"}},
    ("POST", "/v1/handoffs/{name}/test"): {"message": {"text": "tried"}},
    ("POST", "/v1/blocks"): {"label": "blabel"},
    ("PATCH", "/v1/blocks/{block_id}"): {"version": 1, "value": "other"},
    ("POST", "/v1/blocks/{block_id}/rollback"): {"version": 1, "to": 1},
    ("POST", "/v1/blocks/{block_id}/attach"): {"kind": "namespace"},
    ("POST", "/v1/blocks/{block_id}/detach"): {"kind": "namespace"},
    ("PUT", "/v1/block-templates/{name}"): {"blocks": [{"label": "blabel"}]},
    ("POST", "/v1/block-templates/{name}/apply"): {"attach": [{"kind": "namespace"}]},
    ("PUT", "/v1/context/{kind}/{name}"): {"content": "text"},
    ("POST", "/v1/context/relevant"): {"query": "onlyofb"},
    ("POST", "/v1/memories"): {"text": "What a remembers"},
    ("POST", "/v1/actions"): {"action": {"kind": "run_workflow", "workflow": "bflow"}},
    ("POST", "/v1/alerts/silences"): {"matchers": {"rule": "brule"}, "time": "1h"},
    ("POST", "/v1/alerts/{alert_id}/silence"): {"time": "1h"},
    ("PUT", "/v1/alerts/channels/{name}"): {"kind": "log"},
    ("POST", "/v1/memories/forget"): {"query": MARK},
    ("POST", "/v1/memories/{memory_id}/supersede"): {"text": "What a says instead"},
    ("PUT", "/v1/consolidations/schedule"): {"every": "1d"},
    ("PUT", "/v1/memories/extraction"): {"enabled": False},
    ("PUT", "/v1/memories/extraction/{conversation_id}"): {"enabled": True},
    ("PUT", "/v1/runs/{run_id}/scores/{name}"): {"value": 0.5},
    ("POST", "/v1/recall"): {"query": "secret", "scope": "all"},
}
#: What creates or replaces something of the caller under a name that others may have too.
OWN = {
    *(("PUT", "/v1/workflows/{name}"), ("PUT", "/v1/schedules/{name}")),
    ("PUT", "/v1/block-templates/{name}"),
    ("PUT", "/v1/context/{kind}/{name}"),
    ("PUT", "/v1/rules/{name}"),
    ("PUT", "/v1/handoffs/{name}"),
    ("PUT", "/v1/alerts/channels/{name}"),
}
#: What answers a name that is nowhere with 200, because nothing needs to have it.
ANY_NAME = {("POST", "/v1/workflows/{name}/pause"), ("POST", "/v1/workflows/{name}/resume")}
#: Requests without parameters that change something, and their statuses for a caller of namespace a with that body.
WITHOUT_NAMES = {
    ("POST", "/v1/runs"): 404,  # the workflow of b
    ("POST", "/v1/bulk/cancel"): 200,
    ("POST", "/v1/bulk/retry"): 200,
    ("POST", "/v1/keys"): 422,
    ("POST", "/v1/blocks"): 201,
    ("POST", "/v1/context/relevant"): 200,
    ("POST", "/v1/memories"): 201,
    ("POST", "/v1/memories/forget"): 200,
    ("POST", "/v1/consolidations"): 202,
    ("PUT", "/v1/consolidations/schedule"): 200,
    ("PUT", "/v1/memories/extraction"): 200,
    ("POST", "/v1/recall"): 200,
    ("POST", "/v1/rules/test"): 422,
    ("POST", "/v1/actions"): 202,  # the runner looks for the workflow among those of a, and refuses it
    ("POST", "/v1/alerts/silences"): 201,
}
FLOW = {"workflow": "bflow", "steps": [{"id": "wait", "kind": "wait", "for": "1h"}]}
WATCH = {
    "rule": "brule",
    "category": "quality",
    "description": MARK,
    "all": [{"signal": "error_rate", "operator": ">", "threshold": 0.2}],
}
NIGHT = {"schedule": "bnight", "workflow": "bflow", "every": "1d"}


@dataclass(frozen=True)
class Route:
    """A route and one of its methods."""

    method: str
    path: str
    requirement: Requirement
    parameters: frozenset[str]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def with_names(self, place: int, **values: str) -> str:
        """Return the path with names of namespace b (0), or with such that are nowhere (1)."""
        names = next((of for start, of in NAMED.items() if self.path.startswith(start)), {})
        for name in re.findall(r"{(\w+)}", self.path):
            assert name in names, f"{self}: what is its {name}? add it to NAMED or SHARED"
        return re.sub(r"{(\w+)}", lambda found: names[found[1]][place].format(**values), self.path)


@pytest.fixture
def app_client(services: Services) -> TestClient:
    settings = services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    app = serve(replace(services, settings=settings))
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def routes_of(client: TestClient) -> Iterator[Route]:
    for context in iter_route_contexts(client.app.routes):  # type: ignore[attr-defined] # it is a FastAPI
        route = context.original_route
        if not isinstance(route, APIRoute):
            assert getattr(route, "path", None) in PLAIN, route
            continue
        requirement = requirement_of(route)
        assert requirement is not None, f"{context.path}: no scope is declared; see app/api/callers.py"
        found = {one.alias for dependant in [route.dependant] for one in _parameters(dependant)}
        for method in sorted(context.methods or ()):
            yield Route(method, str(context.path_format), requirement, frozenset(found))


def _parameters(dependant: Any) -> Iterator[Any]:
    yield from dependant.query_params
    for other in dependant.dependencies:
        yield from _parameters(other)


def key(database: Database, scopes: set[KeyScope], namespace: str | None = None) -> str:
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    with database.work() as work:
        key_store.create(work, LOCAL, NewKey(MARK, namespace, frozenset(scopes), None), key_id, secret)
    return keys.compose(key_id, secret)


def send(client: TestClient, route: Route, path: str, key: str | None, **more: Any) -> Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = BODIES.get((route.method, route.path), {}) if route.method in ("POST", "PUT", "PATCH") else None
    answer: Response = client.request(route.method, path, headers=headers, json=body, **more)
    return answer


def is_elsewhere(route: Route) -> bool:
    return any(route.path.startswith(start) for start in ELSEWHERE)


def anywhere(path: str) -> str:
    """Return a path whose parameters are any text."""
    return re.sub(r"{\w+}", UNKNOWN, path)


def test_no_route_lets_in_who_has_no_valid_key(app_client: TestClient, database: Database) -> None:
    everything = set(KeyScope)
    revoked, expired = key(database, everything), key(database, everything)
    with database.work() as work:
        work.run(text("UPDATE api_key SET revoked_at = now() WHERE id = :id"), {"id": keys.id_of(revoked)})
        work.run(text("UPDATE api_key SET expires_at = now() WHERE id = :id"), {"id": keys.id_of(expired)})
    foreign = keys.compose("z" * keys.ID_CHARACTERS, "z" * keys.SECRET_CHARACTERS)
    given = {"none": None, "dummy": "sk-1", "foreign": foreign, "revoked": revoked, "expired": expired}
    let_in, opened = [], set()
    for route in routes_of(app_client):
        if not route.requirement.any_of:
            opened.add(route.path)
            continue
        for name, given in {
            "none": None,
            "dummy": "sk-1",
            "foreign": foreign,
            "revoked": revoked,
            "old": expired,
        }.items():
            answer = send(app_client, route, anywhere(route.path), given)
            if answer.status_code != 401 or "WWW-Authenticate" not in answer.headers:
                let_in.append((str(route), name, answer.status_code))

    assert let_in == []
    assert opened == OPEN


def test_no_body_is_read_before_the_caller_is_known(app_client: TestClient) -> None:
    """FastAPI reads and parses a body that is an argument of the endpoint before any dependency; see bodies.of."""
    contexts = iter_route_contexts(app_client.app.routes)  # type: ignore[attr-defined] # it is a FastAPI
    routes = [context.original_route for context in contexts if isinstance(context.original_route, APIRoute)]

    assert [route.path for route in routes if route.body_field is not None] == []


def test_no_route_lets_in_a_key_without_its_scope_or_for_another_namespace(
    app_client: TestClient, database: Database
) -> None:
    without = {scope: key(database, set(KeyScope) - {scope}) for scope in KeyScope}
    lacking = {frozenset({KeyScope.SUBMIT, KeyScope.READ}): key(database, {KeyScope.OPERATE, KeyScope.ADMIN})}
    of_a = key(database, set(KeyScope), "a")
    let_in = []
    for route in routes_of(app_client):
        any_of = route.requirement.any_of
        if not any_of:
            continue
        given = without[next(iter(any_of))] if len(any_of) == 1 else lacking[any_of]
        answer = send(app_client, route, anywhere(route.path), given)
        named = all(f"'{scope}'" in answer.text for scope in any_of)
        if answer.status_code != 403 or not named or "insufficient_scope" not in answer.headers["WWW-Authenticate"]:
            let_in.append((str(route), answer.status_code, answer.text))
        if route.requirement.all_namespaces:
            answer = send(app_client, route, anywhere(route.path), of_a)
            if answer.status_code != 403:
                let_in.append((str(route), "a", answer.status_code))

    assert let_in == []


@pytest.fixture
def of_b(app_client: TestClient, database: Database) -> dict[str, str]:
    """A workflow, a run, a schedule and a key of namespace b; each has the mark."""
    headers = {"Authorization": f"Bearer {key(database, set(KeyScope), 'b')}"}
    flow = {**FLOW, "description": MARK}
    assert app_client.put("/v1/workflows/bflow", json=flow, headers=headers).status_code == 201
    night = {**NIGHT, "description": MARK}
    assert app_client.put("/v1/schedules/bnight", json=night, headers=headers).status_code == 201
    body = {"workflow": "bflow", "labels": {"mark": MARK}}
    run = app_client.post("/v1/runs", json=body, headers={**headers, "Idempotency-Key": "once"})
    assert run.status_code == 202, run.text
    remembered = app_client.post("/v1/memories", json={"text": MARK}, headers=headers).json()
    consolidation = app_client.post("/v1/consolidations", json={}, headers=headers).json()
    services: Services = app_client.app.state.services  # type: ignore[attr-defined] # it is a FastAPI
    conversations = Conversations(services.database, services.settings.conversations)
    made = app_client.post("/v1/keys", json={"name": MARK, "scopes": ["read"]}, headers=headers).json()
    block = app_client.post("/v1/blocks", json={"label": "blabel", "value": MARK}, headers=headers).json()
    template = {"blocks": [{"label": "blabel", "value": MARK}]}
    assert app_client.put("/v1/block-templates/btemplate", json=template, headers=headers).status_code == 200
    assert app_client.put("/v1/rules/brule", json=WATCH, headers=headers).status_code == 201
    handoff = {**HANDOFF, "description": MARK}
    assert app_client.put("/v1/handoffs/bhandoff", json=handoff, headers=headers).status_code == 201
    message = app_client.post("/v1/handoffs/bhandoff/messages", json={"text": MARK}, headers=headers).json()
    with database.work() as work:
        budget = SpendingBudget("b", "bbudget", Decimal(1), BudgetPeriod.MONTH, workflow=MARK)
        budget_store.set_budget(work, budget)
    document = {"content": MARK}
    assert app_client.put("/v1/context/projects/bdocument", json=document, headers=headers).status_code == 201
    channel = {"kind": "log"}
    assert app_client.put("/v1/alerts/channels/bchannel", json=channel, headers=headers).status_code == 201
    silenced = {"matchers": {"rule": MARK}, "time": "1h"}
    silence = app_client.post("/v1/alerts/silences", json=silenced, headers=headers).json()
    acted = {"action": {"kind": "run_workflow", "workflow": "bflow"}, "reason": MARK}
    action = app_client.post("/v1/actions", json=acted, headers=headers).json()
    tested = app_client.post("/v1/alerts/channels/bchannel/test", headers=headers).json()
    with database.work() as work:
        (alerting,) = parse_actions(["alert"])
        alert = AlertService(AlertSettings()).fired(work, Cause(MARK, MARK, namespace="b"), alerting)
    with database.work() as work:
        source_id = run.json()["id"]  # what must not be seen
        recall.put_in(work, [NewPassage("b", SourceKind.MESSAGE, source_id, f"a secret: {MARK}")])
    return {
        "run": run.json()["id"],
        "step": run.json()["steps"][0]["id"],
        "key": made["id"],
        "block": block["id"],
        "message": message["id"],
        "firing": firing_of(database, "brule"),
        "action": action["id"],
        "silence": silence["id"],
        "notification": tested["id"],
        "alert": str(alert),
        "memory": remembered["id"],
        "consolidation": consolidation["id"],
        "memory_conversation": shown_conversation(conversations.create(NewConversation("b")).id),
        "auth": headers["Authorization"],
    }


def firing_of(database: Database, name: str) -> str:
    """Make a rule fire."""
    with database.work() as work:
        stored = next(one for one in rule_store.listed(work, None) if one.name == name)
        rule = check.stored(stored.document)
        firing = rule_store.begin_firing(work, ids.new_id(), stored, rule, "", FiringState.FIRING, MARK, {})
    assert firing is not None
    return str(firing.id)


def state_of(client: TestClient, of_b: dict[str, str]) -> list[Any]:
    """Everything of namespace b, as its own caller sees it."""
    paths = [f"/v1/runs/{of_b['run']}", f"/v1/runs/{of_b['run']}/events", "/v1/workflows", "/v1/schedules"]
    paths += [
        "/v1/blocks",
        "/v1/block-templates",
        "/v1/context",
        "/v1/memories",
        "/v1/rules",
        "/v1/firings",
        "/v1/keys",
    ]
    paths += ["/v1/blocks", "/v1/block-templates", "/v1/context", "/v1/memories", "/v1/actions", "/v1/alerts"]
    paths += ["/v1/budgets", "/v1/alerts/channels", "/v1/alerts/silences", "/v1/alerts/notifications", "/v1/keys"]
    found = [client.get(path, headers={"Authorization": of_b["auth"]}).json() for path in paths]
    for one in found[-1]["keys"]:
        one.pop("used_at")
    return found


def test_what_another_namespace_has_is_answered_as_if_it_were_nowhere(
    app_client: TestClient, database: Database, of_b: dict[str, str]
) -> None:
    of_a, before, wrong = key(database, set(KeyScope), "a"), state_of(app_client, of_b), []
    for route in routes_of(app_client):
        what = (route.method, route.path)
        if not route.requirement.any_of or route.requirement.all_namespaces or "{" not in route.path:
            continue
        if route.path in SHARED or what in OWN or is_elsewhere(route):
            continue
        foreign, nowhere = (route.with_names(place, **of_b) for place in (0, 1))
        answers = [send(app_client, route, path, of_a) for path in (foreign, nowhere)]
        theirs, unknown = (answer.text for answer in answers)
        for ours, other in (
            ("bflow", "nowhere"),
            ("bnight", "nowhere"),
            ("btemplate", "nowhere"),
            ("bdocument", "nowhere"),
            ("brule", "nowhere"),
            ("bhandoff", "nowhere"),
            (of_b["message"], UNKNOWN),
            (of_b["firing"], UNKNOWN),
            (of_b["block"], f"block_{'0' * 32}"),
            (of_b["run"], UNKNOWN),
            (of_b["key"], "0" * 10),
            ("namespace 'b'", "namespace 'nowhere'"),
            *((of_b[name], UNKNOWN) for name in ("action", "alert", "silence", "notification")),
            ("bchannel", "nowhere"),
            ("bbudget", "nowhere"),
            (of_b["memory"], f"mem_{'0' * 32}"),
            (of_b["consolidation"], f"cons_{'0' * 32}"),
            (of_b["memory_conversation"], f"conv_{'0' * 32}"),
        ):
            theirs = theirs.replace(ours, other)
        expected = 200 if what in ANY_NAME else 404
        if [answer.status_code for answer in answers] != [expected, expected] or theirs != unknown:
            wrong.append((str(route), [answer.status_code for answer in answers], theirs, unknown))
        if "namespace" in route.parameters:
            answer = send(app_client, route, foreign, of_a, params={"namespace": "b"})
            if answer.status_code != 422:
                wrong.append((str(route), "namespace=b", answer.status_code, answer.text))

    assert wrong == []
    assert state_of(app_client, of_b) == before


def test_lists_and_requests_for_many_have_nothing_of_another_namespace(
    app_client: TestClient, database: Database, of_b: dict[str, str]
) -> None:
    of_a, before, wrong = key(database, set(KeyScope), "a"), state_of(app_client, of_b), []
    for route in routes_of(app_client):
        if not route.requirement.any_of or route.requirement.all_namespaces or "{" in route.path:
            continue
        if route.path in SHARED or is_elsewhere(route):
            continue
        if route.method != "GET":
            expected = WITHOUT_NAMES.get((route.method, route.path))
            assert expected is not None, f"{route}: add it to WITHOUT_NAMES, or to SHARED"
            answer = send(app_client, route, route.path, of_a)
            if answer.status_code != expected or any(of_b[name] in answer.text for name in ("run", "key")):
                wrong.append((str(route), answer.status_code, answer.text))
            continue
        answer = send(app_client, route, route.path, of_a)
        # The key with which a looks has the mark as its name, too; the audit log, memories and
        # consolidations name it.
        names = ("run", "key", "step", "memory", "consolidation", "action", "alert", "silence", "notification")
        seen = [of_b[name] for name in names if of_b[name] in answer.text]
        named = ("/v1/keys", "/v1/audit", "/v1/memories", "/v1/consolidations")
        seen += [MARK] if MARK in answer.text and route.path not in named else []
        if answer.status_code >= 500 or seen:
            wrong.append((str(route), answer.status_code, seen))
        if "namespace" in route.parameters:
            other = send(app_client, route, route.path, of_a, params={"namespace": "b"})
            if other.status_code != 422:
                wrong.append((str(route), "namespace=b", other.status_code))

    assert wrong == []
    assert state_of(app_client, of_b) == before
    explained = app_client.get(
        "/v1/fleet/explain", params={"step": of_b["step"]}, headers={"Authorization": f"Bearer {of_a}"}
    )
    assert explained.status_code == 404


def test_names_and_keys_of_two_namespaces_do_not_meet(
    app_client: TestClient, database: Database, of_b: dict[str, str]
) -> None:
    a = {"Authorization": f"Bearer {key(database, set(KeyScope), 'a')}"}
    flow = {
        **FLOW,
        "concurrency": {"key": "one", "limit": 1, "policy": "reject"},
        "deduplicate": {"key": "same", "window": "1h"},
    }
    mine = {"workflow": "bflow", "labels": {"mark": "a"}}
    assert app_client.post("/v1/runs", json=mine, headers=a).status_code == 404
    for headers in (a, {"Authorization": of_b["auth"]}):
        assert app_client.put("/v1/workflows/bflow", json=flow, headers=headers).status_code == 201
    submitted = [
        app_client.post("/v1/runs", json={"workflow": "bflow"}, headers={**headers, "Idempotency-Key": "twice"})
        for headers in (a, {"Authorization": of_b["auth"]})
    ]
    assert [answer.status_code for answer in submitted] == [202, 202]
    assert [answer.json()["namespace"] for answer in submitted] == ["a", "b"]
    assert [answer.json()["labels"] for answer in submitted] == [{"namespace": "a"}, {"namespace": "b"}]
    # The same key of b's first run is new for a.
    other = app_client.post("/v1/runs", json={"definition": FLOW}, headers={**a, "Idempotency-Key": "once"})
    assert other.status_code == 202
    # Pausing a's workflow leaves b's alone.
    assert app_client.post("/v1/workflows/bflow/pause", headers=a).json()["runs"] == 2
    run = app_client.get(f"/v1/runs/{submitted[1].json()['id']}", headers={"Authorization": of_b["auth"]}).json()
    assert run["paused"] is False
    assert [one["name"] for one in app_client.get("/v1/schedules", headers=a).json()["schedules"]] == []


def test_a_caller_of_a_namespace_cannot_name_another_one(app_client: TestClient, database: Database) -> None:
    a = {"Authorization": f"Bearer {key(database, set(KeyScope), 'a')}"}
    flow = {**FLOW, "labels": {"namespace": "b"}}

    refused = app_client.post("/v1/runs", json={"definition": FLOW, "labels": {"namespace": "b"}}, headers=a)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["where"] == "labels.namespace"
    # The label of a workflow is not a request for its namespace.
    run = app_client.post("/v1/runs", json={"definition": flow}, headers=a).json()
    assert (run["namespace"], run["labels"]["namespace"]) == ("a", "a")


def test_a_caller_without_a_namespace_sees_all_and_chooses(
    app_client: TestClient, database: Database, of_b: dict[str, str]
) -> None:
    every = {"Authorization": f"Bearer {key(database, set(KeyScope))}"}

    def names(path: str, **parameters: str) -> set[str]:
        found = app_client.get(path, headers=every, params=parameters).json()
        return {one.get("id") or one["name"] for one in found[path.rpartition("/")[2]]}

    assert names("/v1/runs") == names("/v1/runs", namespace="b") == {of_b["run"]}
    assert names("/v1/runs", namespace="default") == set()
    assert "bnight" in names("/v1/schedules")
    assert app_client.get("/v1/workflows/bflow", headers=every).status_code == 404
    assert app_client.get("/v1/workflows/bflow?namespace=b", headers=every).json()["namespace"] == "b"
    assert app_client.get(f"/v1/runs/{of_b['run'][-6:]}", headers=every).json()["namespace"] == "b"
    answer = app_client.post("/v1/runs", json={"workflow": "bflow", "labels": {"namespace": "b"}}, headers=every)
    assert answer.json()["namespace"] == "b"
    assert app_client.get("/v1/runs?namespace=Not+valid", headers=every).status_code == 422
