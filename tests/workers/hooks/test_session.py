"""Hooks around an engine: in their order, within their time, and by their policy when they hang, crash or lie."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from app.inference.hooks.selection import HookTarget
from app.inference.requests import ChatMessage, Generated, GenerateRequest, TextPiece
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.hooks import HookDefinition
from app.kernel.sections.http import HttpSettings
from app.kernel.security.secrets import Secrets
from app.workflows.state_machine.outcomes import Success
from tests.workers.hooks.conftest import HookServer
from workers.engine.simulated import SimulatedEngine
from workers.hooks import processes
from workers.hooks.figures import HookFigures
from workers.hooks.processes import HookProcesses
from workers.hooks.session import HookContext, HookSession

pytestmark = pytest.mark.usefixtures("installed")

WAIT = 120
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


def python(name: str, **more: Any) -> HookDefinition:
    return HookDefinition(name=name.replace("_", "-"), kind="python", entry_point=name, **more)


@pytest.fixture
def engine() -> Iterator[SimulatedEngine]:
    found = SimulatedEngine(2, 2_000.0, timedelta(0))
    yield found
    found.close()


class Around:
    """An engine with hooks around it."""

    def __init__(self, engine: SimulatedEngine, tmp_path: Path) -> None:
        self._engine, self._folder = engine, tmp_path / "secrets"
        self._folder.mkdir(exist_ok=True)
        (self._folder / "hook_key").write_text(SECRET)
        self.context = HookContext(Secrets(self._folder, {}), HookProcesses(), HookFigures())
        self.http = HttpSettings()
        self.stops: list[Any] = []
        self.session: HookSession

    def run(self, *hooks: HookDefinition, prompt: str = "hello a@b.co", on_piece: Any = None, **more: Any) -> Generated:
        self.session = HookSession.of(self.context, hooks, self.http, HookTarget("m", "w", "default"))
        request = GenerateRequest(messages=(ChatMessage("user", prompt),), max_tokens=8, **more)
        found = self.session.around(self._engine, self.stops.append)
        return found.generate(request, on_piece=on_piece).result(WAIT)

    @property
    def results(self) -> list[tuple[str, str, str]]:
        return [(one["hook"], one["at"], one["result"]) for one in self.session.records]


@pytest.fixture
def around(engine: SimulatedEngine, tmp_path: Path) -> Iterator[Around]:
    found = Around(engine, tmp_path)
    yield found
    found.context.processes.close()


def test_hooks_enclose_each_other(around: Around) -> None:
    pii = HookDefinition(name="pii", kind="pii", order=1)
    found = around.run(python("shout", order=3), python("echo", order=2), pii)
    assert found.text == "You wrote: hello a@b.co", "what masks first restores last; the others saw the placeholder"
    assert around.results == [
        ("pii", "pre_prompt", "changed"),
        ("echo", "pre_prompt", "passed"),
        ("shout", "pre_prompt", "changed"),
        ("shout", "post_result", "changed"),
        ("echo", "post_result", "changed"),
        ("pii", "post_result", "changed"),
    ]
    assert "a@b.co" not in json.dumps(around.session.records), "records have no values"
    noted = around.session.noted(Success(None))
    assert noted.usage.hooks == tuple(around.session.records)
    calls, durations = around.context.figures.totals()
    assert (calls["pii", "post_result", "changed"], durations["pii", "post_result"].count) == (1, 1)


@pytest.mark.parametrize(
    ("hook", "result"),
    [
        (python("hang", timeout="300ms"), "timeout"),
        (python("die"), "failed"),
        (python("fail"), "failed"),
        (python("lie"), "invalid"),
        (python("babble"), "invalid"),
        (python("unwritable"), "failed"),
        (python("broken"), "failed"),
        (python("missing"), "failed"),
        (HookDefinition(name="options", kind="words", options={"action": "hide"}), "failed"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_hook_that_fails_follows_its_policy(around: Around, hook: HookDefinition, result: str) -> None:
    with pytest.raises(StepFailure) as caught:
        around.run(hook.model_copy(update={"at": "pre_prompt"}))
    assert caught.value.reason is FailureReason.HOOK_FAILED
    assert hook.name in caught.value.message
    assert "a@b.co" not in caught.value.message, "an error never quotes the prompt"
    assert around.results[-1][2] == result
    opened = around.run(hook.model_copy(update={"at": "pre_prompt", "on_failure": "open"}))
    assert opened.text
    assert around.results[-1][2] == result


def test_a_hook_that_hangs_keeps_no_process_and_others_go_on(around: Around) -> None:
    hang, echo = python("hang", timeout="300ms", on_failure="open"), python("echo")
    with ThreadPoolExecutor(4) as threads:
        for one in [threads.submit(around.run, hang, echo) for _ in range(4)]:
            assert one.result(WAIT).text == "You wrote: hello a@b.co"
    assert not around.context.processes._idle.get("hang")


def test_a_process_is_kept_for_the_next_call(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    around.run(python("echo"))
    monkeypatch.setattr(processes, "_PROGRAM", "there.is.no.such.program")
    assert around.run(python("echo")).text == "You wrote: hello a@b.co"


def test_a_stop_ends_a_hook_at_once(around: Around) -> None:
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(around.run, python("hang", timeout="60s"))
        deadline = time.monotonic() + WAIT
        while not around.stops and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        around.stops[0]()
        with pytest.raises(CancelledError):
            waiting.result(30)


def test_a_refusal_reaches_the_client_and_the_record(around: Around) -> None:
    with pytest.raises(StepFailure, match="refused by the hook refuse: not today") as caught:
        around.run(python("refuse", at="post_result", on_failure="open"))
    assert caught.value.reason is FailureReason.HOOK_REFUSED
    assert around.session.records[0]["annotations"] == {"why": "weekday"}


def test_a_result_must_still_conform_and_a_hook_may_be_kept_from_changing(around: Around) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    with pytest.raises(StepFailure, match="no JSON, as the request demands"):
        around.run(python("break_json"), schema=schema)
    with pytest.raises(StepFailure, match="changes = false"):
        around.run(python("break_json", changes=False))


def test_streams_are_live_held_back_or_restored(around: Around) -> None:
    def pieces(*hooks: HookDefinition) -> tuple[str, str]:
        read: list[TextPiece] = []
        found = around.run(*hooks, on_piece=read.append)
        return "".join(one.text for one in read), found.text

    shown, whole = pieces(HookDefinition(name="language", kind="language"), python("shout", at="pre_prompt"))
    assert shown == whole
    shown, whole = pieces(HookDefinition(name="pii", kind="pii"))
    assert shown == whole
    shown, whole = pieces(python("shout"))
    assert (shown, whole) == ("", whole.upper())


def test_http_hooks_are_signed_and_answer_as_others_do(around: Around, server: HookServer) -> None:
    around.http = HttpSettings(allowed_hosts=(server.authority,), allow_private=True)
    hook = HookDefinition(name="remote", kind="http", url=f"http://{server.authority}/check", secret="hook_key")

    def answer(request: Any) -> tuple[int, bytes]:
        texts = [{**one, "text": f"{request['at']}!"} for one in request["texts"]]
        return 200, json.dumps({"texts": texts, "annotations": {"model": request["model"]}}).encode()

    server.answer = answer
    assert around.run(hook).text == "post_result!"
    headers, body = server.seen[0]
    sent = Webhook(SECRET).verify(body, headers)
    assert (sent["texts"][0]["text"], sent["options"]) == ("hello a@b.co", {})


@pytest.mark.parametrize(
    ("status", "body", "result"),
    [
        (500, b'{"error": "hello a@b.co"}', "failed"),
        (200, b"[]", "failed"),
        (200, b"hello", "failed"),
        (200, b'{"texts": []}', "invalid"),
        (302, b"", "failed"),
        (200, b'{"state": "' + b"x" * 1_100_000 + b'"}', "invalid"),
    ],
)
def test_http_hooks_that_lie_follow_their_policy(
    around: Around, server: HookServer, status: int, body: bytes, result: str
) -> None:
    around.http = HttpSettings(allowed_hosts=(server.authority,), allow_private=True)
    server.answer = lambda _: (status, body)
    hook = HookDefinition(name="remote", kind="http", url=f"http://{server.authority}/", at="pre_prompt")
    with pytest.raises(StepFailure) as caught:
        around.run(hook)
    assert caught.value.reason is FailureReason.HOOK_FAILED
    assert "a@b.co" not in caught.value.message
    assert around.results[-1][2] == result
    assert around.run(hook.model_copy(update={"on_failure": "open"})).text


def test_an_http_hook_calls_no_host_that_is_not_listed_and_waits_no_longer_than_its_limit(
    around: Around, server: HookServer
) -> None:
    hook = HookDefinition(name="remote", kind="http", url=f"http://{server.authority}/", timeout="300ms")
    with pytest.raises(StepFailure, match=r"http\.allowed_hosts"):
        around.run(hook)
    assert not server.seen
    around.http = HttpSettings(allowed_hosts=(server.authority,), allow_private=True)
    go_on = threading.Event()
    server.answer = lambda _: (200, b"{}" if go_on.wait(WAIT) else b"")
    with pytest.raises(StepFailure, match=r"did not answer within 0\.3 s"):
        around.run(hook)
    go_on.set()
