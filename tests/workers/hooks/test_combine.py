"""The hook that asks a server too: when, which answer is used, and what leaves the machine. The server is real."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.catalog import catalog as catalogs
from app.inference.hooks import combination
from app.inference.hooks.combination import CombineOptions
from app.inference.hooks.selection import HookTarget
from app.inference.hooks.shipped import require_options
from app.inference.requests import ChatMessage, FinishReason, Generated, GenerateRequest, Tool
from app.kernel.errors import FailureReason, InvalidSettings, StepFailure
from app.kernel.sections.hooks import HookDefinition
from app.kernel.sections.http import HttpSettings
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from workers.engine.simulated import SimulatedEngine
from workers.hooks.figures import HookFigures
from workers.hooks.processes import HookProcesses
from workers.hooks.remote_answers import RemoteAnswers
from workers.hooks.session import HookContext, HookSession

WAIT = 120
SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
PII = HookDefinition(name="pii", kind="pii", order=-1)


class Asked:
    """A server of OpenAI's form that answers `text`, or with a status, or not at all."""

    def __init__(self) -> None:
        self.text, self.status, self.bodies = "From afar.", 200, list[dict[str, Any]]()
        self.release = threading.Event()
        self.release.set()
        asked = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                asked.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                asked.release.wait(WAIT)
                self.send_response(asked.status)
                self.end_headers()
                usage = {"prompt_tokens": 7, "completion_tokens": 3}
                chunks = [
                    {"choices": [{"delta": {"content": asked.text}}]},
                    {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage},
                ]
                lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"]
                if asked.text == "garbage":
                    lines = ["}{"]
                self.wfile.write("".join(f"data: {line}\n\n" for line in lines).encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def asked() -> Iterator[Asked]:
    found = Asked()
    yield found
    found.close()


class Combining:
    """A local engine, and hooks that may ask a server."""

    def __init__(self, asked: Asked, folder: Path, *, allowed: bool = True) -> None:
        entry = f"""
[[models]]
name = "far:1b"
use_cases = ["chat"]
[models.remote]
url = "http://127.0.0.1:{asked.http.server_port}/v1"
model = "m"
private = true
allowed = {str(allowed).lower()}
retries = 0
"""
        catalog, secrets = catalogs.parse(entry, "test"), Secrets(folder, {})
        self.remotes = RemoteAnswers(lambda: catalog, lambda: Settings(data_dir=folder), secrets)
        self.engine = SimulatedEngine(2, 2_000.0, timedelta(0))
        self.context = HookContext(secrets, HookProcesses(), HookFigures(), self.remotes)

    def run(self, *hooks: HookDefinition, prompt: str = "Hello", **more: Any) -> Generated:
        self.session = HookSession.of(self.context, hooks, HttpSettings(), HookTarget("m", "w", "default"))
        request = GenerateRequest(messages=(ChatMessage("user", prompt),), max_tokens=8, **more)
        return self.session.around(self.engine, lambda _: None).generate(request).result(WAIT)

    @property
    def record(self) -> dict[str, Any]:
        return next(one for one in self.session.records if one["hook"] == "far")


@pytest.fixture
def combining(asked: Asked, tmp_path: Path) -> Iterator[Combining]:
    found = Combining(asked, tmp_path)
    yield found
    found.remotes.close()
    found.engine.close()
    found.context.processes.close()


def far(on_failure: str = "open", timeout: str = "10s", **options: Any) -> HookDefinition:
    values = {"name": "far", "kind": "combine", "at": "post_result", "on_failure": on_failure, "timeout": timeout}
    return HookDefinition.model_validate({**values, "options": {"model": "far:1b", **options}})


def test_the_server_is_asked_where_the_local_answer_is_not_good_enough(combining: Combining, asked: Asked) -> None:
    local = combining.run()
    assert combining.run(far(shorter_than=1)).text == local.text
    assert (combining.record["annotations"], asked.bodies) == ({"asked": False}, [])

    assert combining.run(far(shorter_than=10_000, max_tokens=5)).text == "From afar."
    noted = combining.record["annotations"]
    assert (noted["why"], noted["used"], noted["tokens_out"]) == ("shorter_than", "remote", 3)
    assert (asked.bodies[0]["model"], asked.bodies[0]["messages"][-1]["content"]) == ("m", "Hello")
    assert combining.record["result"] == "changed"

    asked.text = "?"
    assert combining.run(far(choose="longer")).text == local.text
    assert combining.record["annotations"]["used"] == "local"
    assert combining.run(far(matches="[a-z]")).text == "?"


def test_what_hooks_have_masked_leaves_masked_and_comes_back(combining: Combining, asked: Asked) -> None:
    asked.text = "I wrote to <EMAIL_1>."

    found = combining.run(PII, far(), prompt="Write to ana@example.com")

    assert found.text == "I wrote to ana@example.com."
    assert "ana@example.com" not in json.dumps(asked.bodies)
    assert "<EMAIL_1>" in json.dumps(asked.bodies)


@pytest.mark.parametrize(("status", "text"), [(500, "x"), (404, "x"), (200, "garbage")])
def test_a_server_that_fails_follows_the_policy(combining: Combining, asked: Asked, status: int, text: str) -> None:
    local = combining.run()
    asked.status, asked.text = status, text

    assert combining.run(far()).text == local.text
    assert combining.record["result"] == "failed"
    with pytest.raises(StepFailure) as caught:
        combining.run(far(on_failure="closed"))
    assert caught.value.reason is FailureReason.HOOK_FAILED


def test_a_server_that_is_late_is_left(combining: Combining, asked: Asked) -> None:
    asked.release.clear()

    combining.run(far(timeout="200ms"))

    assert combining.record["result"] == "timeout"


def test_an_entry_that_does_not_allow_its_server_is_not_asked(asked: Asked, tmp_path: Path) -> None:
    found = Combining(asked, tmp_path, allowed=False)
    found.run(far())

    assert (found.record["result"], asked.bodies) == ("failed", [])
    assert "allowed" in found.record["error"]
    found.engine.close()


def test_other_requests_are_left_to_the_local_model(combining: Combining, asked: Asked) -> None:
    combining.run(far(), tools=(Tool("look", ""),))
    assert combining.record["annotations"] == {"asked": False, "left_alone": "it has tools"}
    combining.run(far(), n=2)
    assert asked.bodies == []


def text_of(text: str, finish: FinishReason = FinishReason.STOP) -> Generated:
    return Generated(text, finish, 1, 1, 0, timedelta(0), timedelta(0))


def test_answers_in_json_are_chosen_by_their_form() -> None:
    request = GenerateRequest(prompt="x", schema=SCHEMA)
    options = CombineOptions(model="m", invalid_json=True, choose="valid")
    good, bad = text_of('{"city": "Graz"}'), text_of("Graz")

    assert combination.why(options, request, bad) == "invalid_json"
    assert combination.why(options, request, good) is None
    assert combination.uses_remote(options, request, bad, good)
    assert not combination.uses_remote(options, request, good, good)
    assert not combination.uses_remote(replace_choose(options), request, bad, text_of("worse"))
    assert combination.why(CombineOptions(model="m", truncated=True), request, text_of("", FinishReason.LENGTH))


def replace_choose(options: CombineOptions) -> CombineOptions:
    return options.model_copy(update={"choose": "remote"})


@pytest.mark.parametrize(
    "options", [{}, {"model": "m", "matches": "("}, {"model": "m", "other": 1}, {"model": "m", "shorter_than": 0}]
)
def test_wrong_options_are_refused_at_the_start(options: dict[str, Any]) -> None:
    hook = far().model_copy(update={"options": options})
    with pytest.raises(InvalidSettings, match="options"):
        require_options([hook])
    with pytest.raises(ValueError, match="post_result"):
        HookDefinition.model_validate({"name": "far", "kind": "combine", "options": {"model": "m"}})
