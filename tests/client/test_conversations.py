"""Conversations with the Python client, with and without asyncio."""

from __future__ import annotations

import asyncio

import pytest

from arriero_client import AsyncClient, Client, NotFound


def test_the_life_of_a_conversation(api: str) -> None:
    with Client(api) as client:
        made = client.create_conversation(user="ada", title="Tea", metadata={"a": "b"}, retention="30d")
        assert (made.user, made.metadata, made.retention) == ("ada", {"a": "b"}, "30d")
        messages = [{"role": "user", "content": f"I drink tea number {n}"} for n in range(120)]
        stored = client.append_messages(made.id, messages)
        assert [one.seq for one in client.messages(made.id)] == list(range(1, 121))
        assert next(client.messages(made.id, newest_first=True)).id == stored[-1].id
        assert [one.id for one in client.conversations(user="ada", metadata={"a": "b"})] == [made.id]
        assert client.search_messages("tea", conversation_id=made.id, limit=3)[0].conversation == made.id
        assert {one.conversation for one in client.search_messages("tea", user="ada")} == {made.id}
        fork = client.fork_conversation(made.id, at=stored[9].id)
        assert (fork.messages, fork.forked_from) == (10, made.id)
        assert client.export_conversation(fork.id).count(b"\n") == 10
        proof = client.delete_conversation(fork.id)
        assert proof.proved
        assert proof.removed["messages"] == 10
        assert client.delete_user("ada").removed["conversations"] == 1
        with pytest.raises(NotFound):
            client.conversation(made.id)


def test_two_clients_of_asyncio_append_at_once(api: str) -> None:
    async def live() -> None:
        async with AsyncClient(api) as one, AsyncClient(api) as other:
            made = await one.create_conversation()

            async def talk(client: AsyncClient, name: str) -> None:
                for turn in range(10):
                    said = f"{name}{turn}"
                    pair = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
                    await client.append_messages(made.id, pair)

            await asyncio.gather(talk(one, "a"), talk(other, "b"))
            texts = [message.content async for message in one.messages(made.id)]
            assert len(texts) == 40
            assert texts[::2] == texts[1::2]
            for name in "ab":
                assert [text for text in texts[::2] if text[0] == name] == [f"{name}{turn}" for turn in range(10)]

    asyncio.run(live())
