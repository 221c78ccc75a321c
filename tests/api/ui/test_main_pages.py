"""Runs, overview, queues and fleet, without a browser: what they show, to whom, and where things are drawn."""

from __future__ import annotations

import html
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.access import key_store, keys
from app.access.callers import LOCAL, KeyScope
from app.access.keys import NewKey
from app.api.access import sessions
from app.api.callers import COOKIE, DASHBOARD_HEADER
from app.api.fleet.hosts import DeviceOut
from app.api.fleet.pools import PoolOut
from app.api.main import serve
from app.api.services import Services
from app.api.ui import drawing
from app.api.ui.drawing import SPAN
from app.api.ui.pages.fleet_pages import map_of
from app.api.workflows.run_documents import StepOut
from app.fleet.pool import PoolState
from app.governance.rules import service as rule_service
from app.governance.signals import store as signal_store
from app.governance.signals.rollup import roll_up
from app.governance.signals.sample import Sample, SignalLabels
from app.kernel import ids
from app.kernel.sections.access import AccessSettings

PROBE = "<script>alert(1)</script>"
GIB = 1 << 30


@pytest.fixture
def browsers(services: Services) -> Any:
    """A factory of browsers that have logged in."""
    services.settings = services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    app = serve(services)

    def make(*scopes: KeyScope, namespace: str | None = None) -> TestClient:
        browser = TestClient(app, base_url="http://localhost", follow_redirects=False, headers={"Accept": "text/html"})
        key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
        with services.database.work() as work:
            new = NewKey.by(LOCAL, "someone", namespace, list(scopes or KeyScope), None)
            key_store.create(work, LOCAL, new, key_id, secret)
        assert browser.post("/ui/login", json={"key": keys.compose(key_id, secret)}).status_code == 200
        browser.headers[DASHBOARD_HEADER] = sessions.token_of(browser.cookies[COOKIE])
        return browser

    return make


def submitted(browser: TestClient, name: str = "shown", **more: Any) -> str:
    definition = {
        "workflow": name,
        "inputs": {"text": {"type": "string"}},
        "steps": [
            {"id": "ask", "kind": "wait", "approval": {"message": "Go? {{ inputs.text }}"}},
            {"id": "go", "kind": "noop", "needs": ["ask.approved"]},
        ],
    }
    answer = browser.post("/v1/runs", json={"definition": definition, "inputs": {"text": PROBE}, **more})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_a_run_is_shown_and_nothing_in_it_is_markup(browsers: Any) -> None:
    browser = browsers()
    run = submitted(browser, labels={"shop": PROBE[:20]})
    page = browser.get(f"/ui/runs/{run}?step=ask").text
    for shown in ("shown", "ask", "Inputs", "Cancel", "&lt;script&gt;alert(1)", f'data-events="/v1/runs/{run}/events"'):
        assert shown in page
    assert "<script>alert" not in page
    assert "<script>alert" not in browser.get("/ui/runs").text
    assert "<script>alert" not in browser.get("/ui/runs", params={"workflow": PROBE, "label": f"a={PROBE}"}).text


def test_a_run_is_found_by_id_state_workflow_and_label(browsers: Any) -> None:
    browser = browsers()
    name = f"sought-{ids.new_text(8, lower_case=True)}"
    run = submitted(browser, name, labels={"shop": name})
    found = browser.get("/ui/runs", params={"q": run})
    assert (found.status_code, found.headers["Location"]) == (303, f"/ui/runs/{run}")
    for query in ({"q": name}, {"workflow": name, "state": "open"}, {"q": f"shop={name}"}, {"label": f"shop={name}"}):
        assert f"/ui/runs/{run}" in browser.get("/ui/runs", params=query).text, query
    assert "No run is like that" in browser.get("/ui/runs", params={"workflow": name, "state": "failed"}).text
    assert browser.get("/ui/runs", params={"state": "odd"}).status_code == 422


def test_a_workflow_whose_name_is_hexadecimal_is_found(browsers: Any) -> None:
    browser = browsers()
    run = submitted(browser, "deadbeef")
    assert run in browser.get("/ui/runs", params={"q": "deadbeef"}).text


def test_a_run_of_another_namespace_is_as_one_that_does_not_exist(browsers: Any) -> None:
    mine, other = browsers(namespace="ui-mine"), browsers(namespace="ui-other")
    run = submitted(mine, "only-mine")
    assert mine.get(f"/ui/runs/{run}").status_code == 200
    assert other.get(f"/ui/runs/{run}").status_code == 404
    assert other.get(f"/ui/runs/{ids.new_id()}").status_code == 404
    for page in ("/ui/runs", "/ui/overview", "/ui/queues"):
        assert run not in other.get(page).text
    assert run in mine.get("/ui/overview").text
    assert other.get("/ui/fleet").status_code == 403
    assert "/ui/fleet" not in other.get("/ui/overview").text


def test_buttons_are_only_for_those_who_may(browsers: Any) -> None:
    run = submitted(browsers())
    reader = browsers(KeyScope.READ)
    assert "data-api" not in reader.get(f"/ui/runs/{run}").text.partition("<main")[2]
    assert "data-api" not in reader.get("/ui/fleet?defragment=true").text.partition("<main")[2]
    assert "Change many" not in reader.get("/ui/runs").text
    assert reader.post(f"/v1/runs/{run}/cancel").status_code == 403


def step(key: str, *needs: str) -> StepOut:
    return StepOut.model_construct(key=key, needs=list(needs), state="pending")


def test_steps_are_drawn_behind_those_that_they_need() -> None:
    graph = drawing.graph_of([step("d", "b.approved", "c"), step("b", "a"), step("c"), step("a")])
    x = {box.step.key: box.x for box in graph.boxes}
    assert x["a"] == x["c"] < x["b"] < x["d"]
    assert len(graph.edges) == 3
    assert len({(box.x, box.y) for box in graph.boxes}) == 4
    assert drawing.graph_of([]).boxes == []


def test_a_long_chain_and_a_wide_fan_are_drawn() -> None:
    chain = drawing.graph_of([step(f"s{n}", *([f"s{n - 1}"] if n else [])) for n in range(1000)][::-1])
    assert len({box.x for box in chain.boxes}) == 1000
    fan = drawing.graph_of([step("a"), *(step(f"s{n}", "a") for n in range(1000))])
    assert len({box.y for box in fan.boxes}) >= 1000


@pytest.mark.parametrize(
    ("span", "said"),
    [
        (None, "-"),
        (0.25, "250 ms"),
        (1.44, "1.4 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (timedelta(days=3, hours=2), "3 d 2 h"),
    ],
)
def test_spans_are_said_in_words(span: Any, said: str) -> None:
    assert drawing.in_words(span) == said


def test_the_parts_of_a_memory_map_fill_the_device_to_scale() -> None:
    device = DeviceOut.model_construct(
        id="d", total=40 * GIB, capacity=36 * GIB, reserved=20 * GIB, guaranteed=10 * GIB, unmanaged=8 * GIB
    )
    pool = PoolOut.model_construct(
        id="p",
        model=PROBE,
        state=PoolState.SERVING,
        bytes={"d": 16 * GIB},
        used={"d": 8 * GIB},
        created_at=datetime.now(UTC),
    )
    shown = map_of(device, [pool], 80 * GIB)
    # The guarantee of 10 GiB has 8 left: 2 are lent, drawn at the end of the 20 that pools have.
    assert (shown.lent, shown.lent_begin, shown.lent_width) == (2 * GIB, 18 / 80 * SPAN, 2 / 80 * SPAN)
    assert [part.kind for part in shown.parts] == ["serving", "draining", "unmanaged", "guaranteed", "margin"]
    assert shown.parts[0].width == SPAN * 16 / 80
    assert shown.parts[0].measured == SPAN * 8 / 80
    assert shown.parts[-1].begin + shown.parts[-1].width == SPAN / 2
    assert shown.lent == 2 * GIB


def test_no_script_makes_markup_or_code_of_text() -> None:
    here = Path(drawing.__file__).parent
    for script in (here / "static").glob("*.js"):
        text = script.read_text()
        assert not any(word in text for word in ("eval(", "new Function", "insertAdjacentHTML", ".outerHTML")), script
        # Only what the server has rendered, and escaped, is markup.
        assert ".innerHTML = " not in text.replace(".innerHTML = await answer.text()", ""), script


def test_targets_show_what_is_so_now_and_where_it_is_worst(browsers: Any, services: Services) -> None:
    rule_service.ensure_builtin(services.database)
    with services.database.work() as work:
        for host, used in (("near", 0.5), ("far", 0.9)):
            signal_store.write(work, [Sample("memory_utilisation", used, SignalLabels(host=host, device="gpu-0"))])
    page = browsers().get("/ui/overview").text
    assert "memory-high" in page
    assert "at most 80.0 %" in page
    assert 'state-failed">90.0 %</span> <span class="soft">far' in page


@pytest.mark.parametrize("window", ["1h", "24h", "7d"])
def test_trends_show_the_sums_of_raw_points(browsers: Any, services: Services, window: str) -> None:
    """As one statement over the points of series says; a key of a namespace sees no other one's."""
    with services.database.work() as work:
        now = work.rows(text("SELECT now() AS now"))[0].now
        signal_store.write(
            work,
            [
                Sample(signal, n, SignalLabels(f"m{n % 3}", namespace=f"n{n % 2}"), at=now - timedelta(minutes=n))
                for n in (*range(1, 55), *range(66, 200))  # none is at the edge of an hour ago
                for signal in ("tokens", "cost")
            ],
        )
    roll_up(services.database, lambda: True)
    # Kept in minutes for a day, so they say what each window has.
    raw = text("""
        SELECT model, CAST(sum(total) AS bigint) AS total FROM signal_point
        JOIN signal_series AS series ON series.id = series_id
        WHERE signal = 'tokens' AND resolution = 1 AND at >= :begin AND (:namespace = '' OR namespace = :namespace)
        GROUP BY model
    """)
    for namespace in ("", "n1"):
        page = browsers(namespace=namespace or None).get(f"/ui/trends?window={window}").text
        figure = page[page.index('id="tokens"') :]
        data = json.loads(figure[figure.index('json">') + 6 : figure.index("</script>")])
        begin = now - {"1h": timedelta(hours=1), "24h": timedelta(hours=24), "7d": timedelta(days=7)}[window]
        given = {"begin": begin.replace(second=0, microsecond=0), "namespace": namespace}
        with services.database.work() as work:
            expected = {row.model: row.total for row in work.rows(raw, given)}
        assert {one["label"]: sum(filter(None, one["values"])) for one in data["series"]} == expected
        assert f"<strong>{sum(expected.values()):,}</strong>" in figure[: figure.index("</figcaption>")]
        costs = page[page.index('id="costs"') :]
        assert ("<td>n0</td>" in costs) == (namespace == "")
        assert "<td>n1</td>" in costs


def test_a_queue_of_a_model_that_is_not_in_the_catalogue_is_shown(browsers: Any) -> None:
    browser = browsers()
    steps = [{"id": "a", "kind": "generate", "model": "gone:1b", "prompt": "x"}]
    browser.post("/v1/runs", json={"definition": {"workflow": "w", "steps": steps}})
    page = browser.get("/ui/queues").text
    assert "gone:1b" not in page or "no model of this name is in the catalogue" in page


def test_documents_are_stored_by_those_who_may(browsers: Any) -> None:
    writer, reader = browsers(), browsers(KeyScope.READ)
    for path, form in (("alerts", "new-rule"), ("alerts", "new-channel"), ("schedules", "new-schedule")):
        assert f'id="{form}"' in writer.get(f"/ui/{path}").text
        assert f'id="{form}"' not in reader.get(f"/ui/{path}").text
    text = writer.get("/ui/alerts").text
    example = text[text.index("rule: first-tokens-late") : text.index("</textarea>")].replace("&#34;", '"')
    answer = writer.put(
        "/v1/rules/first-tokens-late",
        content=html.unescape(example),
        headers={"Content-Type": "application/yaml", "Accept": "application/json"},
    )
    assert answer.status_code == 201, answer.text


def test_keys_lead_to_the_pages_that_a_reader_sees(browsers: Any) -> None:
    page = browsers(KeyScope.READ).get("/ui/overview").text
    keys_ = re.findall(r'<a href="([^"]+)" data-key="(.)"', page)
    assert ("/ui/runs", "r") in keys_
    assert "/ui/settings" not in dict(keys_)
    assert len({key for _, key in keys_}) == len(keys_)
