"""Memory blocks, which prompts contain and models edit, and the personal context of users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from arriero_client import exchange
from arriero_client.effects import Operation, Request
from arriero_client.exchange import Retries
from arriero_client.operations import operation
from arriero_client.results import Block, BlockDiff, BlockVersion, ContextDocument, ContextPart


@dataclass(frozen=True, slots=True)
class Attach:
    """What blocks are attached to, or for whom a prompt is made; each is a name or an id."""

    user: str | None = None
    #: The id of a conversation.
    conversation: str | None = None
    agent: str | None = None
    #: Every prompt of the namespace.
    everybody: bool = False

    def targets(self) -> list[dict[str, str]]:
        """Return them as the API names them."""
        given = {
            "user": self.user,
            "conversation": self.conversation,
            "agent": self.agent,
            "namespace": "" if self.everybody else None,
        }
        return [{"kind": kind, "name": name} for kind, name in given.items() if name is not None]


class Blocks:
    """The operations on memory blocks and on documents of users."""

    retries: Retries

    @operation
    def create_block(
        self,
        label: str,
        value: str = "",
        *,
        description: str = "",
        limit: int | None = None,
        read_only: bool = False,
        attach: Attach | None = None,
    ) -> Operation[Block]:
        """Create a memory block and attach it."""
        body = {
            "label": label,
            "value": value,
            "description": description,
            "read_only": read_only,
            "attach": [] if attach is None else attach.targets(),
            **({} if limit is None else {"limit": limit}),
        }
        request = Request("POST", "/v1/blocks", body=body, repeatable=False)
        return Block.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def block(self, block_id: str) -> Operation[Block]:
        """Return a block."""
        return (yield from _block(self, Request("GET", _path(block_id))))

    @operation
    def blocks(
        self,
        *,
        label: str | None = None,
        user: str | None = None,
        conversation: str | None = None,
        agent: str | None = None,
        archived: bool | None = None,
        query: str | None = None,
        limit: int = 50,
    ) -> Operation[Sequence[Block]]:
        """Return blocks, the newest first."""
        wanted = {"label": label, "user": user, "conversation": conversation, "agent": agent, "query": query}
        shown = None if archived is None else str(archived).lower()
        request = Request("GET", "/v1/blocks", {**wanted, "archived": shown, "limit": limit})
        found = yield from exchange.send_json(request, self.retries)
        return [Block.model_validate(one) for one in found["blocks"]]

    @operation
    def edit_block(
        self,
        block: Block,
        *,
        value: str | None = None,
        description: str | None = None,
        limit: int | None = None,
        read_only: bool | None = None,
    ) -> Operation[Block]:
        """Edit a block as it was read. Raises Conflict when it has changed since."""
        given = {"value": value, "description": description, "limit": limit, "read_only": read_only}
        body = {"version": block.version, **{name: one for name, one in given.items() if one is not None}}
        return (yield from _block(self, Request("PATCH", _path(block.id), body=body, repeatable=False)))

    @operation
    def rollback_block(self, block: Block, to: int) -> Operation[Block]:
        """Make a new version of a block as it was read, which says what the version `to` said. Raises Conflict."""
        body = {"to": to, "version": block.version}
        return (yield from _block(self, Request("POST", f"{_path(block.id)}/rollback", body=body, repeatable=False)))

    @operation
    def block_versions(self, block_id: str, *, limit: int = 50) -> Operation[Sequence[BlockVersion]]:
        """Return the versions of a block, the newest first."""
        request = Request("GET", f"{_path(block_id)}/versions", {"limit": limit})
        found = yield from exchange.send_json(request, self.retries)
        return [BlockVersion.model_validate(one) for one in found["versions"]]

    @operation
    def block_diff(self, block_id: str, old: int | None = None, new: int | None = None) -> Operation[BlockDiff]:
        """Return what changed between two versions, by default the last two."""
        request = Request("GET", f"{_path(block_id)}/diff", {"from": old, "to": new})
        return BlockDiff.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def attach_block(self, block_id: str, to: Attach) -> Operation[Block]:
        """Attach a block."""
        return (yield from _attached(self, block_id, "attach", to))

    @operation
    def detach_block(self, block_id: str, from_: Attach) -> Operation[Block]:
        """Detach a block."""
        return (yield from _attached(self, block_id, "detach", from_))

    @operation
    def archive_block(self, block_id: str) -> Operation[Block]:
        """Take a block out of prompts; recall finds it."""
        return (yield from _block(self, Request("POST", f"{_path(block_id)}/archive")))

    @operation
    def restore_block(self, block_id: str) -> Operation[Block]:
        """Take an archived block back into prompts."""
        return (yield from _block(self, Request("POST", f"{_path(block_id)}/restore")))

    @operation
    def delete_block(self, block_id: str) -> Operation[None]:
        """Delete a block with its versions."""
        yield from exchange.send(Request("DELETE", _path(block_id)), self.retries)

    @operation
    def apply_template(self, name: str, to: Attach, *, keep: bool = False) -> Operation[Sequence[str]]:
        """Create the blocks of a template; with `keep`, only those whose labels are not there. Returns their ids."""
        body = {"attach": to.targets(), "existing": "keep" if keep else "refuse"}
        request = Request("POST", f"/v1/block-templates/{quote(name, safe='')}/apply", body=body, repeatable=False)
        return list((yield from exchange.send_json(request, self.retries))["ids"])

    @operation
    def put_context(
        self,
        kind: str,
        name: str,
        content: str | Mapping[str, Any] | Sequence[Any],
        *,
        user: str | None = None,
        version: int | None = None,
    ) -> Operation[ContextDocument]:
        """Store a document: Markdown, or plain data as JSON. Without a user it belongs to the whole namespace."""
        request = Request("PUT", _document(kind, name), {"user": user}, body={"content": content, "version": version})
        return ContextDocument.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def context(self, kind: str, name: str, *, user: str | None = None) -> Operation[ContextDocument]:
        """Return a document with its content."""
        request = Request("GET", _document(kind, name), {"user": user})
        return ContextDocument.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def context_documents(
        self, *, user: str | None = None, kind: str | None = None, limit: int = 100
    ) -> Operation[Sequence[ContextDocument]]:
        """Return documents, the oldest first, without their contents."""
        request = Request("GET", "/v1/context", {"user": user, "kind": kind, "limit": limit})
        found = yield from exchange.send_json(request, self.retries)
        return [ContextDocument.model_validate(one) for one in found["documents"]]

    @operation
    def delete_context(self, kind: str, name: str, *, user: str | None = None) -> Operation[None]:
        """Delete a document."""
        yield from exchange.send(Request("DELETE", _document(kind, name), {"user": user}), self.retries)

    @operation
    def relevant_context(
        self, query: str, *, user: str | None = None, limit: int = 8
    ) -> Operation[Sequence[ContextPart]]:
        """Return the parts of documents that a prompt about something contains."""
        body = {"query": query, "limit": limit, **({} if user is None else {"user": user})}
        found = yield from exchange.send_json(Request("POST", "/v1/context/relevant", body=body), self.retries)
        return [ContextPart.model_validate(one) for one in found["parts"]]


def _block(client: Blocks, request: Request) -> Operation[Block]:
    return Block.model_validate((yield from exchange.send_json(request, client.retries)))


def _attached(client: Blocks, block_id: str, action: str, to: Attach) -> Operation[Block]:
    targets = to.targets()
    if not targets:
        raise ValueError("name a user, a conversation or an agent, or everybody")
    for target in targets:
        block = yield from _block(client, Request("POST", f"{_path(block_id)}/{action}", body=target))
    return block


def _path(block_id: str) -> str:
    return f"/v1/blocks/{quote(block_id, safe='')}"


def _document(kind: str, name: str) -> str:
    return f"/v1/context/{quote(kind, safe='')}/{quote(name, safe='')}"
