"""What a server can do, and whether it does it: one small real request for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arriero_client import exchange
from arriero_client.effects import Clock, Operation, Request
from arriero_client.errors import ClientError, NotAvailable
from arriero_client.exchange import Retries
from arriero_client.models import Models
from arriero_client.operations import operation
from arriero_client.results import Capabilities, Check, Health, Model, Reasoned

#: By part, the path that a server with it has.
_PARTS: Mapping[str, str] = {
    "embedding": "/v1/embeddings",
    "reasoning": "/v1/chat/completions",
    "compression": "/v1/compress",
    "consolidation": "/v1/consolidations",
}
#: The question of the check, and the form of its answer.
_QUESTION = "Answer with yes."
_SCHEMA = {"enum": ["yes", "no"]}


class Capable(Models):
    """The operations on the server as a whole."""

    retries: Retries

    @operation
    def capabilities(self) -> Operation[Capabilities]:
        """Return what the server offers, from its OpenAPI document."""
        return (yield from _capabilities(self))

    @operation
    def check_health(
        self,
        parts: Sequence[str] = ("embedding", "reasoning"),
        *,
        embedding_model: str | None = None,
        reasoning_model: str | None = None,
    ) -> Operation[Health]:
        """
        Return whether parts of the server work, each by one small real request with its latency.

        Parts are `embedding`, `reasoning`, `compression` and `consolidation`. A model that is not named is chosen,
        loaded ones first. Loading a model is in the latency.
        """
        if unknown := [part for part in parts if part not in _PARTS]:
            raise ValueError(f"{unknown[0]!r} cannot be checked; accepted: {', '.join(_PARTS)}")
        named = {"embedding": embedding_model, "reasoning": reasoning_model}
        offered: Sequence[Model] = ()
        checks: dict[str, Check] = {}
        for part in parts:
            model = named.get(part)
            try:
                yield from _require(self, part)
                if model is None and part != "consolidation":
                    offered = offered or (yield from Models.models.function(self))
                    model = _chosen(offered, part)
                checks[part] = yield from _check(self, part, model)
            except ClientError as error:
                checks[part] = Check(False, model=model, error=error)
        return Health(checks)


def _check(client: Capable, part: str, model: str | None) -> Operation[Check]:
    if part == "consolidation":
        began = yield Clock()
        yield from exchange.send_json(Request("GET", "/v1/consolidations/schedule"), client.retries)
        return Check(True, (yield Clock()) - began)
    assert model is not None, "one was chosen"
    if part == "embedding":
        found = yield from Models.embed.function(client, model, "health")
        return Check(bool(found.vectors and found.vectors[0]), found.latency_s, model)
    if part == "compression":
        made = yield from Models.compress_prompt.function(client, model, _QUESTION, max_tokens=64)
        return Check(made.text == _QUESTION, made.latency_s, model)
    parameters: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    reasoned: Reasoned[Any] = yield from Models.reason.function(client, model, _QUESTION, _SCHEMA, **parameters)
    return Check(reasoned.value in _SCHEMA["enum"], reasoned.answer.latency_s, model)


def _chosen(models: Sequence[Model], part: str) -> str:
    """A model for a part, loaded ones first. Raises NotAvailable."""
    order = ["resident", "loading", "cold"]

    def suits(model: Model) -> bool:
        vectors = {"embed", "rerank"}
        return "embed" in model.use_cases if part == "embedding" else not vectors.issuperset(model.use_cases)

    able = [model for model in models if suits(model) and model.state in order]
    if not able:
        raise NotAvailable(part, f"the server has no usable model for {part}")
    return min(able, key=lambda model: order.index(model.state)).id


def _capabilities(client: Capable) -> Operation[Capabilities]:
    document = yield from exchange.send_json(Request("GET", "/openapi.json"), client.retries)
    paths: Mapping[str, Any] = document.get("paths", {})
    operations = [one for path in paths.values() for one in path.values() if isinstance(one, dict)]
    tags = frozenset(str(tag) for one in operations for tag in one.get("tags", ()))
    return Capabilities(str(document.get("info", {}).get("version", "")), frozenset(paths), tags)


def _require(client: Capable, part: str) -> Operation[None]:
    """Raises NotAvailable when the server does not have the part."""
    found = yield from _capabilities(client)
    path = _PARTS[part]
    if path not in found.paths:
        raise NotAvailable(part, f"this server (version {found.version}) has no {path}")
