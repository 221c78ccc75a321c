"""Memory blocks and documents, with both clients."""

from __future__ import annotations

import asyncio

import pytest

import arriero_client
from arriero_client import AsyncClient, Attach, Client


def test_blocks_and_documents(api: str) -> None:
    with Client(api) as client:
        made = client.create_block("human", "Ana", attach=Attach(user="ana"))
        edited = client.edit_block(made, value="Ana\nVigo")
        with pytest.raises(arriero_client.Conflict):
            client.edit_block(made, value="x")
        assert client.block_diff(made.id).diff.endswith("+Vigo")
        assert client.rollback_block(edited, 1).value == "Ana"
        assert [one.version for one in client.block_versions(made.id)] == [3, 2, 1]
        shared = client.attach_block(made.id, Attach(agent="helper", everybody=True))
        assert [one["kind"] for one in shared.attached] == ["agent", "namespace", "user"]
        assert client.archive_block(made.id).archived_at is not None
        assert [one.id for one in client.blocks(archived=True, label="human")] == [made.id]
        assert client.blocks(archived=False) == []
        assert client.restore_block(made.id).archived_at is None
        assert len(client.detach_block(made.id, Attach(agent="helper")).attached) == 2
        assert len(client.apply_template("assistant", Attach(user="ana"), keep=True)) == 1
        client.delete_block(made.id)

        stored = client.put_context("projects", "boat", "# Boat\nIt is called Marea.", user="ana", version=0)
        assert client.put_context("knowledge", "facts", {"cat": "Pixel"}, user="ana").format == "json"
        assert client.context("projects", "boat", user="ana").content == "# Boat\nIt is called Marea."
        assert [one.name for one in client.context_documents(user="ana")] == ["boat", "facts"]
        assert [one.document_id for one in client.relevant_context("Marea", user="ana", limit=1)] == [stored.id]
        client.delete_context("projects", "boat", user="ana")

    async def read() -> list[str]:
        async with AsyncClient(api) as client:
            return [one.name for one in await client.context_documents(user="ana")]

    assert asyncio.run(read()) == ["facts"]
