"""
The HTTP API, as the tools call it: with the key of their caller, so that they can do what the caller can, and no more.

At `/mcp` the requests stay in the process; `arriero mcp` sends them to a running installation.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import httpx2

from app.kernel.errors import Problem

#: Most bytes of an answer that a tool reads.
MAX_BYTES = 4 * 1_048_576


class Refused(Exception):
    """The API, or a tool, refuses a call. The text says what is wrong, where, and what would be accepted."""

    def __init__(self, message: str, problems: Sequence[Problem] = (), status: int = 422) -> None:
        super().__init__("\n".join([message, *(f"- {problem}" for problem in problems)]))
        #: The status of the API's answer.
        self.status = status


class Api:
    """Calls of the API for one caller."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON of a resource. Parameters that are None are left out. Raises Refused."""
        return await self._call("GET", path, params=_given(parameters))

    async def post(self, path: str, body: Any = None, **parameters: Any) -> Any:
        """Post JSON. Returns the JSON of the answer. Raises Refused."""
        return await self._call("POST", path, json=body, params=_given(parameters))

    async def submit(self, body: Any, key: str | None, path: str = "/v1/runs") -> Any:
        """Submit a run, or something else, under an idempotency key if there is one. Raises Refused."""
        return await self._call("POST", path, json=body, headers={"Idempotency-Key": key} if key else {})

    async def delete(self, path: str, **parameters: Any) -> Any:
        """Delete a resource. Returns the JSON of the answer, or None. Raises Refused."""
        return await self._call("DELETE", path, params=_given(parameters))

    async def readiness(self) -> Any:
        """Return what `/readyz` says of each component, also when one is not ok. Raises Refused."""
        return await self._call("GET", "/readyz", accepted=(503,))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _call(self, method: str, path: str, *, accepted: Collection[int] = (), **more: Any) -> Any:
        try:
            answer = await self._http.request(method, path, **more)
        except httpx2.TransportError as error:
            raise Refused(
                f"no API answers at {self._http.base_url} ({error}); is `arriero up` running?", (), 503
            ) from None
        if len(answer.content) > MAX_BYTES:
            raise Refused(f"the answer of {path} has {len(answer.content)} bytes; ask for less than {MAX_BYTES}")
        if not answer.is_success and answer.status_code not in accepted:
            raise _refused(answer)
        return answer.json() if answer.content else None


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _refused(answer: httpx2.Response) -> Refused:
    """Make an error of an answer: a problem document, or one of OpenAI's form."""
    try:
        document = answer.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        document = {}
    if not isinstance(document, dict):
        document = {}
    error = document.get("error")
    detail = error.get("message") if isinstance(error, dict) else document.get("detail")
    found = document.get("errors")
    problems = [
        Problem(str(one.get("where", "")), str(one.get("message", "")), str(one.get("accepted") or ""))
        for one in (found if isinstance(found, list) else [])
        if isinstance(one, dict)
    ]
    hint = f"; try again in {wait} s" if (wait := answer.headers.get("Retry-After")) else ""
    # The detail of a refusal with problems repeats them.
    text = str(document.get("title") or "refused") if problems else str(detail or f"HTTP {answer.status_code}")
    return Refused(f"{text}{hint}", problems, answer.status_code)
