"""Scheduled jobs, with both clients."""

from __future__ import annotations

import asyncio

import pytest

import arriero_client
from arriero_client import AsyncClient, Client


def test_jobs(api: str) -> None:
    with Client(api) as client:
        assert "sweep" in {job.name for job in client.list_jobs()}
        assert client.pause_job("expire", "we look & see").paused_reason == "we look & see"
        assert client.resume_job("expire").state == "active"
        assert client.set_job_trigger("expire", cron="0 3 * * *", timezone="Europe/Madrid").changed
        assert client.set_job_trigger("expire", every="1h").trigger["every"] == "1h"
        assert not client.set_job_trigger("expire").changed
        requested = client.run_job("expire")
        assert client.get_job_pass("expire", requested.id).state == "requested"
        with pytest.raises(arriero_client.NotFound):
            client.get_job("nothing")

    async def read() -> str:
        async with AsyncClient(api) as client:
            return (await client.get_job("sweep")).state

    assert asyncio.run(read()) == "active"
