"""
The whole platform on two software GPUs: `arriero up`, its planner, its ledger, its agent and its pools.

Each device has room for one of three models; a fourth is larger than both devices together.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.catalog import files
from app.devices import llama_build
from app.devices.device import GpuBackend
from app.devices.vulkan.loader import VulkanFailed, VulkanLoader
from tests.live.conftest import Live, running, until

MODELS = ("alpha:1", "beta:1", "gamma:1")
HUGE = "huge:1"
DEVICES = ("software-0", "software-1")
PATH = files.locate(files.read_catalog().get("smollm2:135m"), Path("/nowhere"))
#: One of the models fits, two do not, and neither does a third one that is split over what two leave.
SIZE = 200 * 2**20
_ENTRY = """
[[models]]
name = "{name}"
use_cases = ["complete"]
source = {{ path = "{path}" }}
slots = {slots}
context = {context}
engine = {{ batch = 32, ubatch = 32 }}
pools = {{ only = {only} }}
"""


def why_not() -> str:
    """Return why there are no software devices here; empty when there are."""
    if GpuBackend.VULKAN not in llama_build.backends():
        return "llama.cpp is built without Vulkan: make test-gpu"
    try:
        kinds = {device["kind"] for device in VulkanLoader().devices()}
    except VulkanFailed as error:
        return str(error)
    return "" if "software" in kinds else "Vulkan has no software device: apt install mesa-vulkan-drivers"


@contextmanager
def platform(folder: Path, **more: Any) -> Iterator[Live]:
    """Run `arriero up` with the models on two devices."""
    only = json.dumps([f"{socket.gethostname()}/{name}" for name in DEVICES])
    catalog = folder / "catalog.toml"
    sizes = dict.fromkeys(MODELS, (1, 256)) | {HUGE: (16, 2048)}
    catalog.write_text(
        "".join(
            _ENTRY.format(name=name, path=PATH, only=only, slots=slots, context=context)
            for name, (slots, context) in sizes.items()
        )
    )
    settings = {"catalog.files": [str(catalog)], "pools.models": [], "fleet.software": [SIZE, SIZE], **more}
    given = [
        f"--set={name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    ]
    with running(folder, *given) as found:
        yield found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with platform(tmp_path_factory.mktemp("gpu")) as found:
        yield found


def pools(tree: Live, *, ended: bool = False) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx2.get(f"{tree.api}/v1/pools", params={"ended": ended}, timeout=30).json()[
        "pools"
    ]
    return found


def submit(tree: Live, model: str, tokens: int = 2) -> str:
    step = {"id": "write", "kind": "generate", "model": model, "prompt": "The sea", "chat": False, "max_tokens": tokens}
    return tree.submit({"workflow": "ask", "steps": [{**step, "retry": {"max_attempts": 20, "delay": "100ms"}}]})


def succeed(tree: Live, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = tree.until_ended(run_id)
    assert found["state"] == "succeeded", found
    return found


def serving(tree: Live, model: str) -> dict[str, Any]:
    """The pool of a model, after a run on it."""
    succeed(tree, submit(tree, model))
    found: dict[str, Any] = until(
        lambda: next((p for p in pools(tree) if p["model"] == model and p["state"] == "serving"), None)
    )
    return found


def ended(tree: Live, id_: str) -> dict[str, Any]:
    found: dict[str, Any] = until(
        lambda: next((p for p in pools(tree, ended=True) if p["id"] == id_ and p["ended_at"]), None)
    )
    return found


def on(pool: dict[str, Any]) -> str:
    (device,) = (name for name in pool["devices"] if name != "cpu")
    return str(device)


def log(tree: Live, pool: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (tree.folder / "logs" / f"pool.{pool['id']}.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def started(tree: Live, pool: dict[str, Any]) -> datetime:
    """When the pool began to load its model."""
    (line,) = (line for line in log(tree, pool) if line["event"] == "model_loading" and "device" in line)
    return datetime.fromisoformat(line["timestamp"])


def assert_nothing_is_overcommitted(tree: Live) -> None:
    """A pool that waits for others has bytes of theirs, which are not charged twice."""
    held: dict[str, int] = {}
    for pool in (pool for pool in pools(tree) if not pool["waits_for"]):
        for id_, size in pool["bytes"].items():
            held[id_] = held.get(id_, 0) + size
    assert all(size <= SIZE for id_, size in held.items() if "software" in id_), held
