"""`arriero chat` at a terminal, with a real model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import httpx2
import pexpect
import pytest

from tests.live.conftest import MODEL, PATIENCE, ROOT, Live, until

pytestmark = pytest.mark.slow

PROMPT = ">>> "


@pytest.fixture
def chat(live: Live) -> Iterator[pexpect.spawn]:  # type: ignore[type-arg] # generic only in its stubs
    command = ["-m", "app", f"--data-dir={live.folder}", f"--set=api.url={live.api}", "chat", MODEL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    options = ["--max-tokens=1500", "--temperature=0"]
    child = pexpect.spawn(
        sys.executable,
        [*command, *options],
        timeout=PATIENCE,
        encoding="utf-8",
        env=environment,
        cwd=str(ROOT),
        dimensions=(40, 200),
    )
    child.expect(PROMPT)
    yield child
    child.close(force=True)


def ask(chat: pexpect.spawn, text: str) -> None:  # type: ignore[type-arg] # as above
    chat.send(text)
    chat.expect_exact(text.split("\n")[-1])
    chat.send("\r")


def test_a_conversation_is_edited_stopped_and_remembered(chat: pexpect.spawn, live: Live) -> None:  # type: ignore[type-arg] # as above
    ask(chat, "/help")
    chat.expect("forget the conversation")
    chat.expect(PROMPT)
    ask(chat, "Tell me a very long story about a king, a queen, and their seven children, in all detail.")
    runs = f"{live.api}/v1/runs?workflow=openai&state=running"
    until(lambda: httpx2.get(runs, timeout=PATIENCE).json()["runs"])  # a call is recorded with its first token
    chat.sendintr()
    chat.expect("stopped")
    chat.expect(PROMPT)
    ask(chat, "/undo")
    chat.expect("the last message is forgotten")
    chat.expect(PROMPT)
    ask(chat, "/undo")
    chat.expect("there is nothing to forget")
    chat.expect(PROMPT)
    ask(chat, "/nonsense")
    chat.expect("no command")
    chat.expect(PROMPT)
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.wait()
    assert chat.exitstatus == 0
    history = live.folder / "chat-history"
    assert "long story" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0, "only its owner reads it"
