"""The scaler over HTTP."""

from __future__ import annotations

from fastapi.testclient import TestClient

from app.api.services import Services
from app.kernel.sections.scaler import ScaledClass, ScalerSettings


def test_a_plan_is_shown_with_its_reasons_and_changes_nothing(client: TestClient, services: Services) -> None:
    assert client.get("/v1/scaler").json() == {"mode": "off", "classes": []}
    scaled = ScaledClass(name="l4", type="NVIDIA L4", bytes=2**30, min=2, max=4)
    services.settings = services.settings.model_copy(update={"scaler": ScalerSettings(classes=(scaled,))})
    for _ in range(2):
        (found,) = client.get("/v1/scaler").json()["classes"]
        assert (found["needed"], found["wanted"], found["would_ask"], found["pending"]) == (2, 2, True, None)
        assert found["reasons"] == ["0 would be needed; the limits of the class are 2 and 4"]
