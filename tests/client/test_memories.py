"""Memories through the client."""

from __future__ import annotations

from arriero_client import Client


def test_memories_from_the_first_to_the_last_operation(api: str) -> None:
    with Client(api) as client:
        tea = client.remember("Ana prefers tea", kind="preference", user="ana")
        assert (tea.created, client.remember("ana prefers tea.", user="ana").created) == (True, False)
        coffee = client.supersede_memory(tea.id, "Ana prefers coffee", note="she said so")
        assert client.memory(tea.id).superseded_by == coffee.id
        assert [one.text for one in client.memories(user="ana")] == ["Ana prefers coffee"]
        assert len(client.memories(user="ana", everything=True)) == 2
        assert client.mark_breakthrough(coffee.id).kind == "breakthrough"
        assert [one.id for one in client.memories(kind="breakthrough")] == [coffee.id]
        assert client.invalidate_memory(coffee.id).invalid_at is not None
        assert {one.id for one in client.matching_memories("prefers", user="ana")} == {tea.id, coffee.id}
        done = client.forget(coffee.id, with_history=True)
        assert (set(done.forgotten), done.proved) == ({tea.id, coffee.id}, True)
        client.remember("Ana sings", user="ana")
        assert len(client.forget_user("ana").forgotten) == 1
        assert client.memories(everything=True) == []
