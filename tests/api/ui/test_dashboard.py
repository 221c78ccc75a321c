"""The dashboard's pages without a browser: who sees what, how one logs in, and what each page says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from app.access import key_store, keys
from app.access.callers import LOCAL, KeyScope
from app.access.keys import NewKey
from app.api.access import sessions
from app.api.callers import COOKIE, DASHBOARD_HEADER
from app.api.main import serve
from app.api.services import Services
from app.api.ui.pages.trends_page import in_words
from app.api.ui.pages.workflow_pages import field_of
from app.api.ui.pages.written import compared, written
from app.api.ui.rendering import NAVIGATION
from app.governance.signals.names import Unit
from app.kernel import ids
from app.kernel.sections.access import AccessSettings
from app.workflows.language import check

FLOW = "workflow: {name}\ndescription: <b>bold</b>\nsteps:\n  - {{id: a, kind: noop}}\n"
Login = Callable[..., TestClient]


@pytest.fixture
def login(services: Services) -> Login:
    """A factory of browsers that have logged in, with the scopes and the namespace of a key."""
    services.settings = services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    app = serve(services)

    def make(*scopes: KeyScope, namespace: str | None = None) -> TestClient:
        browser = TestClient(
            app, base_url="http://localhost", follow_redirects=False, headers={"Accept": "text/html,*/*;q=0.8"}
        )
        key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
        new = NewKey.by(LOCAL, f"key of {namespace}", namespace, list(scopes or KeyScope), None)
        with services.database.work() as work:
            key_store.create(work, LOCAL, new, key_id, secret)
        answer = browser.post("/ui/login", json={"key": keys.compose(key_id, secret)})
        assert answer.status_code == 200, answer.text
        return browser

    return make


def change(browser: TestClient) -> dict[str, str]:
    """The header that a change of the dashboard has."""
    return {DASHBOARD_HEADER: sessions.token_of(browser.cookies[COOKIE])}


def put(browser: TestClient, name: str, text: str = FLOW) -> None:
    headers = {"Content-Type": "application/yaml", **change(browser)}
    answer = browser.put(f"/v1/workflows/{name}", content=text.format(name=name), headers=headers)
    assert answer.status_code in (200, 201), answer.text


def test_every_page_is_there_when_nothing_is(login: Login) -> None:
    """Empty states, not errors; and each page carries the policy that forbids foreign and inline scripts."""
    browser = login()
    for page in NAVIGATION:
        answer = browser.get(page.path)
        assert answer.status_code == 200, f"{page.path}: {answer.text[:500]}"
        assert "script-src 'self';" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert not re.search(r"<script(?![^>]*\bsrc=)(?![^>]*application/json)", answer.text), "no inline script"
        assert not re.search(r"""\s(on\w+|style)=["']""", answer.text), "no inline handler and no inline style"


def test_no_page_without_a_key(login: Login) -> None:
    """Without a cookie every page leads to the login, which anybody may see."""
    browser = login()
    browser.cookies.clear()
    for page in NAVIGATION:
        answer = browser.get(page.path)
        assert (answer.status_code, answer.headers["Location"].partition("?")[0]) == (303, "/ui/login"), page.path
        assert f'data-then="{page.path}"' in browser.get(answer.headers["Location"]).text


@pytest.mark.parametrize("elsewhere", ["https://evil.example", "//evil.example", "/v1/runs", "javascript:x", "/ui/\\"])
def test_a_login_leads_to_pages_of_the_dashboard_only(login: Login, elsewhere: str) -> None:
    page = login().get("/ui/login", params={"next": elsewhere}).text
    assert 'data-then="/ui/overview"' in page


def test_the_cookie_is_for_this_site_alone(login: Login) -> None:
    browser = login()
    browser.cookies.clear()
    refused = browser.post("/ui/login", json={"key": "arr_0000000000_none"})
    assert refused.status_code == 401
    assert "set-cookie" not in refused.headers


def test_a_session_ends_with_its_key_and_no_cookie_is_a_key(login: Login) -> None:
    """The cookie has nothing of the key. Revoking the key, and logging out, end the session wherever its cookie is."""
    admin, other = login(), login()
    session = other.cookies[COOKIE]
    assert keys.PREFIX not in session
    assert admin.get("/v1/runs", headers={"Authorization": f"Bearer {session}"}).status_code == 401
    assert other.get("/ui/workflows").status_code == 200
    found = admin.get("/v1/keys").json()["keys"]
    key_id = max(found, key=lambda one: one["created_at"])["id"]
    assert admin.post(f"/v1/keys/{key_id}/revoke", headers=change(admin)).status_code == 200
    assert other.get("/ui/workflows").headers["Location"].startswith("/ui/login")
    session = admin.cookies[COOKIE]
    admin.post("/ui/logout", headers=change(admin))
    admin.cookies.set(COOKIE, session)
    assert admin.get("/ui/workflows").status_code == 303


def test_a_change_needs_the_token_of_its_own_session(login: Login) -> None:
    one, other = login(), login()
    body = {"name": "x", "scopes": ["read"]}
    for headers in ({}, {DASHBOARD_HEADER: ""}, {DASHBOARD_HEADER: "1"}, change(other)):
        assert one.post("/v1/keys", json=body, headers=headers).status_code == 401
    assert one.post("/v1/keys", json=body, headers=change(one)).status_code == 201


def test_a_login_sets_a_cookie_that_no_script_reads(login: Login) -> None:
    browser = login()
    made = browser.post("/v1/keys", json={"name": "x", "scopes": ["read"]}, headers=change(browser)).json()
    cookie = browser.post("/ui/login", json={"key": made["key"]}).headers["set-cookie"].lower()
    assert cookie.startswith(f"{COOKIE}=")
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_a_change_needs_more_than_the_cookie(login: Login) -> None:
    """A page that makes the browser send the cookie cannot set a header without a preflight, which is refused."""
    browser = login()
    body = {"content": FLOW.format(name="w"), "headers": {"Content-Type": "application/yaml"}}
    assert browser.put("/v1/workflows/w", **body).status_code == 401
    body["headers"] = {**body["headers"], **change(browser), "Origin": "https://evil.example"}
    assert browser.put("/v1/workflows/w", **body).status_code == 403
    put(browser, "w")


def test_the_audit_log_has_who_logged_in_and_not_the_key(login: Login) -> None:
    browser = login()
    (entry,) = (one for one in browser.get("/v1/audit").json()["entries"] if one["action"] == "POST /ui/login")
    assert entry["actor"] == "key of None"
    assert re.search(r"arr_[0-9a-z]{10}_\*{3}", entry["summary"])
    assert not re.search(r"arr_[0-9a-z]{10}_[0-9A-Za-z]", entry["summary"])


def test_logging_out_forgets_the_key(login: Login) -> None:
    browser = login()
    assert browser.post("/ui/logout", headers=change(browser)).status_code == 204
    assert browser.get("/ui/workflows").status_code == 303


def test_a_namespace_sees_only_its_own(login: Login) -> None:
    a, b = login(namespace="a"), login(namespace="b")
    put(b, "only-of-b")
    talk = b.post("/v1/conversations", json={"title": "zebra talk"}, headers=change(b)).json()["id"]
    memory = b.post("/v1/memories", json={"text": "zebra fact"}, headers=change(b)).json()["id"]
    block = b.post("/v1/blocks", json={"label": "zebralabel"}, headers=change(b)).json()["id"]
    for page in NAVIGATION:
        assert "zebra" not in a.get(page.path).text, page.path
        assert "only-of-b" not in a.get(page.path).text, page.path
    for path in (
        "workflows/only-of-b",
        "workflows/only-of-b/edit",
        "workflows/only-of-b?namespace=b",
        f"conversations/{talk}",
        f"memories/{memory}",
        f"blocks/{block}",
    ):
        assert b.get(f"/ui/{path}").status_code == 200, path
        assert a.get(f"/ui/{path}").status_code == (422 if "=b" in path else 404), path


def test_a_reader_sees_no_buttons_and_no_administration(login: Login) -> None:
    reader = login(KeyScope.READ)
    put(login(), "w")
    page = reader.get("/ui/workflows/w").text
    assert 'data-api="POST' not in page.replace('data-api="POST /ui/logout"', "")
    for path in ("/ui/settings", "/ui/keys", "/ui/audit", "/ui/playground"):
        assert reader.get(path).status_code == 403, path
    shown = reader.get("/ui/workflows").text
    assert "/ui/settings" not in shown


def test_what_people_wrote_is_text(login: Login) -> None:
    browser = login()
    put(browser, "w")
    page = browser.get("/ui/workflows/w").text
    assert "&lt;b&gt;bold" in page
    assert "<b>bold" not in page


def test_the_check_says_the_line(login: Login) -> None:
    browser = login()
    headers = {"Content-Type": "application/yaml", **change(browser)}
    wrong = browser.post(
        "/ui/workflows/check", content="workflow: w\nsteps:\n  - {id: a, kind: nope}\n", headers=headers
    )
    assert 'data-problem-line="3"' in wrong.text
    good = browser.post("/ui/workflows/check", content=FLOW.format(name="w"), headers=headers)
    assert "It is valid" in good.text
    assert browser.get("/v1/workflows/w").status_code == 404, "a check stores nothing"


def test_versions_are_compared(login: Login) -> None:
    browser = login()
    put(browser, "w")
    put(browser, "w", FLOW + "  - {{id: added, kind: noop}}\n")
    page = browser.get("/ui/workflows/w/diff?old=1&new=2").text
    assert "steps.added" in page
    assert "diff-added" in page


def test_an_unknown_page_is_a_page(login: Login) -> None:
    answer = login().get("/ui/workflows/nowhere")
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    assert "nowhere" in answer.text


def test_what_is_written_is_read_again() -> None:
    document = check.parse("workflow: w\nsteps:\n  - {id: a, kind: noop}\n").document()
    assert check.parse(written(document)).document() == document
    text = written({"steps": [{"prompt": "one\ntwo", "kind": "generate", "id": "a"}]})
    assert text.index("id: a") < text.index("kind:") < text.index("prompt: |")


def test_a_comparison_leaves_out_what_is_equal() -> None:
    before = "\n".join(map(str, range(30)))
    found = compared(before, before.replace("15", "fifteen"))
    assert [one.text for one in found if one.sign == "+"] == ["fifteen"]
    assert [one.text for one in found if one.sign == "-"] == ["15"]
    assert len(found) == 8
    assert not compared(before, before)


@pytest.mark.parametrize(
    ("schema", "kind", "value"),
    [
        ({"type": "string", "default": "Hello"}, "area", "Hello"),
        ({"type": "string", "maxLength": 20}, "text", ""),
        ({"type": "string", "enum": ["x", "y"], "default": "y"}, "choice", "y"),
        ({"type": "integer", "default": 3}, "integer", "3"),
        ({"type": "boolean", "default": True}, "boolean", "true"),
        ({"type": "array"}, "json", ""),
        ({}, "json", ""),
    ],
)
def test_an_input_gets_the_field_of_its_schema(schema: dict[str, object], kind: str, value: str) -> None:
    field = field_of("x", schema)
    assert (field.kind, field.value) == (kind, value)
    assert field.required == ("default" not in schema)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.1234, Unit.RATIO, "12.3 %"),
        (0.05, Unit.SECONDS, "50 ms"),
        (90.0, Unit.SECONDS, "90.0 s"),
        (7200.0, Unit.SECONDS, "2.0 h"),
        (1234567.0, Unit.TOKENS, "1,234,567"),
        (0.00412, Unit.CURRENCY, "0.0041"),
    ],
)
def test_values_are_in_words(value: float, unit: Unit, words: str) -> None:
    assert in_words(value, unit) == words
