"""What calls cost: the time of a pool's devices, and hard budgets."""

from __future__ import annotations

import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from app.governance.costs import budget_store
from app.governance.costs.budget import BudgetPeriod, SpendingBudget
from app.governance.costs.pricing import DeviceShare
from app.kernel.database import Database
from app.kernel.sections.costs import CostSettings, DeviceRate
from app.kernel.settings import Settings
from tests.api.openai.conftest import MODEL, StartPool
from tests.faults.conftest import until
from tests.governance.costs.conftest import Spend, spend  # noqa: F401 a fixture

HELLO = [{"role": "user", "content": "Hello."}]


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """An hour of the device costs 3600: a microsecond a millionth."""
    costs = CostSettings(devices=(DeviceRate(match="gpu", hour=3600, watts=1000),), kwh=3600)
    return Settings(data_dir=tmp_path, database_url=database_url, redis_url=redis_url, costs=costs)


def post(api: str, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{api}{path}", json={"model": MODEL, **body}, timeout=60)


def ended(database: Database, count: int) -> list[Any]:
    with database.work() as work:
        rows = work.rows(text("SELECT cost, cost_basis FROM attempt WHERE finished_at IS NOT NULL"))
    return rows if len(rows) == count else []


def test_calls_share_the_time_of_the_devices(api: str, start_pool: StartPool, database: Database) -> None:
    pool = start_pool(slots=4, tokens_per_second=200.0)
    pool.runtime.charges.devices = {"GPU-0": DeviceShare("h/gpu-0", "T", "gpu", 1, 2)}
    calls = [
        threading.Thread(target=post, args=(api, "/v1/chat/completions"), kwargs={"messages": HELLO, "max_tokens": 20})
        for _ in range(4)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join(60)
    rows = until(lambda: ended(database, 4))
    for row in rows:
        assert row.cost_basis["device_us"] > 0
        # Half of the device: by the hour, and by its energy, a thousand watts at 3600 a kilowatt-hour.
        assert row.cost == Decimal(row.cost_basis["device_us"]) / 1_000_000
        assert (row.cost_basis["per_hour"], row.cost_basis["watts"], row.cost_basis["watts_are"]) == (
            "1800",
            "500",
            "stated",
        )
    with database.work() as work:
        (span,) = work.rows(
            text("SELECT extract(epoch FROM max(finished_at) - min(started_at)) * 1000000 AS us FROM attempt")
        )
    # Rows are written by threads of their own, some milliseconds before and after the work itself.
    assert sum(row.cost_basis["device_us"] for row in rows) <= int(span.us) + 1_000_000


def test_a_call_is_refused_when_the_budget_is_used_up(
    api: str,
    start_pool: StartPool,
    database: Database,
    spend: Spend,  # noqa: F811 as above
) -> None:
    start_pool()
    spend("2", namespace="default")
    with database.work() as work:
        budget_store.set_budget(
            work, SpendingBudget("default", "daily", Decimal(2), BudgetPeriod.DAY, is_hard=True, model=MODEL)
        )
    with database.work() as work:
        work.run(text("UPDATE attempt SET model = :model"), {"model": MODEL})
    for streamed in (False, True):
        for path, body in (
            ("/v1/chat/completions", {"messages": HELLO}),
            ("/v1/completions", {"prompt": "Hello"}),
            ("/v1/responses", {"input": "Hello"}),
        ):
            answer = post(api, path, stream=streamed, **body)
            assert answer.status_code == 402, answer.text
            assert answer.json()["error"]["code"] == "insufficient_quota"
            assert "'daily'" in answer.json()["error"]["message"]
        assert post(api, "/api/chat", messages=HELLO, stream=streamed).status_code == 402
    assert post(api, "/v1/embeddings", input="Hello").status_code == 402
