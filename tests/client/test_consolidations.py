"""Consolidations through the Python client, against the API."""

from __future__ import annotations

import pytest

import arriero_client
from arriero_client import Client


def test_a_consolidation_is_begun_once_watched_and_cancelled(api: str) -> None:
    with Client(api) as client:
        begun = client.consolidate(model="smollm2:135m", namespace="a")
        again = client.consolidate(namespace="a")
        assert (begun.created, again.created, again.id) == (True, False, begun.id)
        assert (begun.state, begun.model, begun.review_model) == ("queued", "smollm2:135m", "smollm2:135m")
        assert [one.id for one in client.consolidations(namespace="a")] == [begun.id]

        assert client.cancel_consolidation(begun.id).state == "cancelled"

        assert client.consolidation(begun.id).has_ended
        with pytest.raises(arriero_client.Conflict):
            client.cancel_consolidation(begun.id)
        with pytest.raises(arriero_client.NotFound):
            client.consolidate(model="nothing")


def test_the_schedule_of_a_namespace(api: str) -> None:
    with Client(api) as client:
        assert client.consolidation_schedule(namespace="a").every is None
        chosen = client.set_consolidation_schedule("1d", model="gemma3:270m", namespace="a")
        assert (chosen.every, chosen.model) == ("1d", "gemma3:270m")
        assert chosen.next_at is not None
        assert client.consolidation_schedule(namespace="b").every is None
        with pytest.raises(arriero_client.InvalidRequest, match="every"):
            client.set_consolidation_schedule("1s", namespace="a")
