"""Files and batches: many requests in one file, done when there is room for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from arriero_client import exchange
from arriero_client.effects import Clock, Operation, Request, Sleep
from arriero_client.errors import TimedOut
from arriero_client.exchange import Retries
from arriero_client.operations import operation
from arriero_client.results import Batch, File

#: The longest and the shortest pause between two looks at a batch, in seconds.
_LONGEST, _SHORTEST = 10.0, 0.5


class Files:
    """The operations on files and batches."""

    retries: Retries

    @operation
    def upload(self, content: bytes | str | Path, *, name: str = "", purpose: str = "batch") -> Operation[File]:
        """Upload a file: its bytes, its text, or its path."""
        if isinstance(content, Path):
            name, content = name or content.name, content.read_bytes()
        raw = content.encode() if isinstance(content, str) else content
        request = Request(
            "POST", "/v1/files", form={"purpose": purpose}, file=(name or "input.jsonl", raw), repeatable=False
        )
        return File.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def file_content(self, file_id: str) -> Operation[bytes]:
        """Return the content of a file."""
        request = Request("GET", f"/v1/files/{quote(file_id, safe='')}/content")
        return (yield from exchange.send(request, self.retries)).content

    @operation
    def delete_file(self, file_id: str) -> Operation[None]:
        """Delete a file."""
        yield from exchange.send(Request("DELETE", f"/v1/files/{quote(file_id, safe='')}"), self.retries)

    @operation
    def create_batch(
        self,
        requests: str | Iterable[Mapping[str, Any]],
        *,
        endpoint: str = "/v1/chat/completions",
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
    ) -> Operation[Batch]:
        """
        Create a batch of requests: the bodies of an endpoint, in order, or the id of an uploaded file.

        The lines of a batch made of bodies have the ids `0`, `1`, ….
        """
        file_id = requests if isinstance(requests, str) else ""
        if not isinstance(requests, str):
            lines = [
                json.dumps({"custom_id": str(index), "method": "POST", "url": endpoint, "body": dict(body)})
                for index, body in enumerate(requests)
            ]
            file_id = (yield from Files.upload.function(self, "\n".join(lines) + "\n")).id
        body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": completion_window}
        request = Request(
            "POST",
            "/v1/batches",
            body={**body, **({"metadata": dict(metadata)} if metadata else {})},
            headers={"Idempotency-Key": exchange.new_key()},
            repeatable=False,
        )
        return Batch.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def batch(self, batch_id: str) -> Operation[Batch]:
        """Return a batch."""
        return (yield from _batch(self, batch_id))

    @operation
    def batches(self, *, limit: int = 20, after: str | None = None) -> Operation[Sequence[Batch]]:
        """Return batches, the newest first. `after` is the id of the last known one."""
        request = Request("GET", "/v1/batches", {"limit": limit, "after": after})
        found = yield from exchange.send_json(request, self.retries)
        return [Batch.model_validate(one) for one in found["data"]]

    @operation
    def cancel_batch(self, batch_id: str) -> Operation[Batch]:
        """Cancel a batch; finished lines keep their results."""
        request = Request("POST", f"/v1/batches/{quote(batch_id, safe='')}/cancel")
        return Batch.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def wait_batch(self, batch_id: str, *, timeout: float | None = None) -> Operation[Batch]:
        """Wait until a batch has ended, and return it. Raises TimedOut."""
        began, pause = (yield Clock()), _SHORTEST
        while True:
            found = yield from _batch(self, batch_id)
            if found.is_final:
                return found
            if timeout is not None and (yield Clock()) - began >= timeout:
                raise TimedOut(f"batch {batch_id} has not ended within {timeout:g} s; it is {found.status}")
            yield Sleep(pause)
            pause = min(pause * 1.5, _LONGEST)

    @operation
    def batch_results(self, batch_id: str) -> Operation[Mapping[str, Any]]:
        """Return by the id of a line its response, or its error, of all lines that are done."""
        found, results = (yield from _batch(self, batch_id)), dict[str, Any]()
        for file_id in filter(None, (found.output_file_id, found.error_file_id)):
            request = Request("GET", f"/v1/files/{quote(file_id, safe='')}/content")
            content = (yield from exchange.send(request, self.retries)).content
            for line in content.splitlines():
                if line.strip():
                    one = json.loads(line)
                    results[str(one["custom_id"])] = one
        return results


def _batch(client: Files, batch_id: str) -> Operation[Batch]:
    request = Request("GET", f"/v1/batches/{quote(batch_id, safe='')}")
    return Batch.model_validate((yield from exchange.send_json(request, client.retries)))
