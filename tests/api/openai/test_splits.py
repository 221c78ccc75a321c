"""Splits of calls over HTTP: a simulated pool, a server that answers, and the database."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import httpx2
import pytest

from app.kernel.database import Database
from tests.api.openai.conftest import MODEL, StartPool
from tests.api.openai.test_fallback import HELLO, PATIENCE, Server, ended, server

__all__ = ["server"]  # a fixture

SPLIT: dict[str, Any] = {
    "split": "trial",
    "model": MODEL,
    "candidates": [{"name": "b", "model": "server:first", "system": "Be brief.", "set": {"max_tokens": 3}}],
    "pins": [{"variant": "b", "users": ["ana"]}, {"variant": "control", "users": ["bea"]}],
    "ramp": [{"share": 0.5}],
}


def post(api: str, path: str, body: Any = None, status: int = 200) -> Any:
    found = httpx2.post(f"{api}/v1/{path}", json={} if body is None else body, timeout=PATIENCE)
    assert found.status_code == status, found.text
    return found


def ask(api: str, user: str, model: str = MODEL) -> httpx2.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 8, "user": user}
    found: httpx2.Response = post(api, "chat/completions", body)
    return found


def test_calls_of_a_user_go_to_one_variant_until_the_split_ends(
    api: str, start_pool: StartPool, server: Server, database: Database
) -> None:
    server.says("Hi")
    start_pool()
    start_pool(model="server:first", engine=server.engine())
    assert post(api, "splits", SPLIT, 201).json()["state"] == "running"

    candidate, control = ask(api, "ana"), ask(api, "bea")

    assert candidate.headers["X-Arriero-Model"] == "server:first"
    assert candidate.headers["X-Arriero-Reason"] == "split trial: b"
    assert control.headers["X-Arriero-Model"] == MODEL
    assert "X-Arriero-Reason" not in control.headers
    found = ended(database, candidate.headers["X-Arriero-Run"]).run
    assert found.labels["split.trial"] == "b"
    assert found.inputs["request"]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert found.inputs["request"]["max_tokens"] == 3
    assert ended(database, control.headers["X-Arriero-Run"]).run.labels["split.trial"] == "control"

    post(api, "splits/trial/stop?reason=enough")
    after = ask(api, "ana")
    assert after.headers["X-Arriero-Model"] == MODEL
    assert not [name for name in ended(database, after.headers["X-Arriero-Run"]).run.labels if "split" in name]


def test_a_fallback_of_a_candidate_counts_for_no_variant(
    api: str, start_pool: StartPool, server: Server, database: Database
) -> None:
    server.status = 500
    start_pool()
    start_pool(model="server:first", engine=server.engine())
    post(api, "splits", SPLIT, 201)

    answer = ask(api, "ana")

    assert answer.headers["X-Arriero-Model"] == MODEL
    labels = ended(database, answer.headers["X-Arriero-Run"]).run.labels
    assert "split.trial" not in labels
    assert ended(database, labels["fallback_after"]).run.labels["split.trial"] == "b"


def test_outcomes_and_scores_are_shown(api: str, start_pool: StartPool, database: Database) -> None:
    start_pool()
    same = {**SPLIT, "candidates": [{"name": "b", "set": {"max_tokens": 3}}]}
    post(api, "splits", same, 201)
    run = UUID(ask(api, "ana").headers["X-Arriero-Run"])
    ended(database, str(run))

    scored = httpx2.put(f"{api}/v1/runs/{run}/scores/helpful", json={"value": 0.5, "comment": "so so"})

    assert scored.json()["scores"][0] | {"at": None} == {
        "name": "helpful",
        "value": 0.5,
        "comment": "so so",
        "author": "local",
        "at": None,
    }
    assert httpx2.get(f"{api}/v1/runs/{run}/scores").json() == scored.json()
    assert httpx2.put(f"{api}/v1/runs/{run}/scores/helpful", json={"value": 2}).status_code == 422
    nowhere = "01a20000-0000-7000-8000-000000000000"
    assert httpx2.put(f"{api}/v1/runs/{nowhere}/scores/helpful", json={"value": 1}).status_code == 404
    shown = httpx2.get(f"{api}/v1/splits/trial").json()
    assert [one["name"] for one in shown["variants"]] == ["control", "b"]
    assert {one["metric"] for one in shown["comparisons"]} == {"error", "seconds", "first_token", "score"}
    assert {one["verdict"] for one in shown["comparisons"]} == {"undecided"}
    assert httpx2.put(f"{api}/v1/splits/trial/share", json={"share": 0.2}).json()["share"] == 0.2
    assert [one["name"] for one in httpx2.get(f"{api}/v1/splits").json()["splits"]] == ["trial"]
    assert httpx2.delete(f"{api}/v1/splits/trial").status_code == 409
    post(api, "splits/trial/stop")
    assert httpx2.delete(f"{api}/v1/splits/trial").status_code == 204


@pytest.mark.parametrize(
    ("asked", "units"),
    [({"metric": "error", "effect": 0.05, "base": 0.05}, 1_000), ({"metric": "seconds", "effect": 0.1}, 2_000)],
)
def test_the_size_is_told_beforehand(api: str, asked: dict[str, Any], units: int) -> None:
    assert units < post(api, "splits/size", asked).json()["units"] < 40 * units


def test_what_is_wrong_is_told(api: str) -> None:
    refused = post(api, "splits", {**SPLIT, "candidates": [{"name": "b", "model": "nobody:1b"}]}, 422).json()
    assert refused["errors"][0]["where"] == "candidates.0.model"
    assert httpx2.get(f"{api}/v1/splits/nowhere").status_code == 404
