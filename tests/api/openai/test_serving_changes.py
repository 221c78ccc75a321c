"""What rules change of the serving of models, as clients of the API see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from app.catalog.serving.overrides import overridden
from app.inference.routing import choice
from app.inference.routing.availability import NOTHING_KNOWN
from app.kernel.sections.governance import ServingSettings
from tests.api.openai.conftest import MODEL, StartPool, catalog

HELLO = [{"role": "user", "content": "Hello."}]
OTHER = "gemma3:270m"


@contextmanager
def settings(api: str, **values: Any) -> Iterator[None]:
    """Change run-time settings of the section `serving`, as rules do, and change them back."""
    changed = {f"serving.{name}": value for name, value in values.items()}
    body = {"settings": changed, "reason": "a test"}
    assert httpx2.patch(f"{api}/v1/admin/settings", json=body).status_code == 200
    yield
    body = {"settings": dict.fromkeys(changed), "reason": "the end of a test"}
    assert httpx2.patch(f"{api}/v1/admin/settings", json=body).status_code == 200


def chat(api: str, model: str = MODEL) -> httpx2.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 3}
    return httpx2.post(f"{api}/v1/chat/completions", json=body, timeout=60)


def test_a_paused_model_is_refused_at_once_and_served_again(api: str, start_pool: StartPool) -> None:
    start_pool()
    assert chat(api).status_code == 200
    with settings(api, paused=[MODEL]):
        refused = chat(api)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, f"{MODEL} is paused")
    assert chat(api).status_code == 200


def test_requests_for_a_diverted_model_go_to_the_other_one(api: str, start_pool: StartPool) -> None:
    start_pool(model=MODEL)
    with settings(api, diverted=[f"{OTHER}={MODEL}"]):
        answer = chat(api, OTHER)
    assert (answer.status_code, answer.headers["X-Arriero-Model"]) == (200, MODEL)


def test_work_of_a_class_that_is_shed_is_refused_and_other_work_is_not(api: str, start_pool: StartPool) -> None:
    start_pool()
    steps = [{"id": "a", "kind": "noop"}]
    with settings(api, shed=["batch"]):
        run = {"definition": {"workflow": "x", "priority": "batch", "steps": steps}}
        refused = httpx2.post(f"{api}/v1/runs", json=run)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "30")
        assert "serving.shed" in refused.json()["detail"]
        call = {"model": MODEL, "messages": HELLO, "service_tier": "batch"}
        late = httpx2.post(f"{api}/v1/chat/completions", json=call)
        assert (late.status_code, late.headers["Retry-After"]) == (503, "30")
        assert chat(api).status_code == 200
        run["definition"]["priority"] = "standard"
        assert httpx2.post(f"{api}/v1/runs", json=run).status_code == 202


def test_overrides_change_the_catalogue_and_leave_the_rest() -> None:
    plain = catalog()
    serving = ServingSettings(
        paused=("server:last", "nowhere"), diverted=(f"{OTHER}={MODEL}+nowhere", "nowhere=x"), slots=(f"{MODEL}=2",)
    )
    changed = overridden(plain, serving)

    assert overridden(plain, ServingSettings()) is plain
    assert (changed.get(MODEL).slots, plain.get(MODEL).slots) == (2, 4)
    assert changed.paused == {"server:last"}
    assert changed.diverted == {OTHER: (MODEL,)}
    plan = choice.plan(changed.get(OTHER), changed, NOTHING_KNOWN)
    assert [model.name for model in plan.tried] == [MODEL, OTHER]
    plan = choice.plan(changed.get("local:first"), changed, NOTHING_KNOWN)
    assert [model.name for model in plan.tried] == ["local:first"]
    assert [one.reason for one in plan.passed_over] == ["server:last is paused"]
